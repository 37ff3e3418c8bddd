"""Evaluation without labels. Read `diagnose` first."""
