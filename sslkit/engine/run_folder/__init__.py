"""The run folder: its layout, its lock and the identity of its dataset. Read `layout` first."""
