"""From pixels to views: policies, random parameters, and their CPU and GPU implementations. Read `policies` first."""
