"""Tools for image sets: inspect, find duplicates, pack. Read `inspection` first."""
