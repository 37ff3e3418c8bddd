"""Checkpoints: their format, writing, retention and validation. Read `format` first."""
