"""Evaluations with labels: kNN, linear, sweep, fine-tuning. Read `scoring` first."""
