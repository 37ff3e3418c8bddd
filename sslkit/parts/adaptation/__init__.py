"""What a run trains of a pretrained backbone, and what keeps it near its start. Read `adapt_config` first."""
