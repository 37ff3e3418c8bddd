"""What a run logs: messages, metrics, trackers, sample images, throughput. Read `logger` first."""
