"""What a run evaluates while it trains: kNN, collapse diagnostics, alarms. Read `evaluations` first."""
