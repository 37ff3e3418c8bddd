"""Settings of PyTorch and Python during a run: precision, garbage collection, compilation. Read `precision`."""
