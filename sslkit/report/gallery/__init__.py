"""Images in a report: neighbours, map, attention, and augmented views. Read `run_gallery` first."""
