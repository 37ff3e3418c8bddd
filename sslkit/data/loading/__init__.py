"""Batches from worker processes. Read `loader` first, then `worker_pool`."""
