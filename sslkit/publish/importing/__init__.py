"""Import of other projects' checkpoints as timm folders. Read `convert` first."""
