"""Import checkpoints of other projects as timm folders. Read `convert` first."""
