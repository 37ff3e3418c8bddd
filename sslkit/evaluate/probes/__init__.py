"""Evaluations with labels: kNN, linear probes, a sweep of linear probes, and fine-tuning. Read `scoring` first."""
