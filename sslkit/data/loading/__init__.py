"""Batches from worker processes. Read `loader` first."""
