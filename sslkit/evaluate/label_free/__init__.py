"""Evaluations without labels. Read `diagnose` first."""
