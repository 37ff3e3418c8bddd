"""What a run does when something goes wrong: bad steps, signals, crash dumps, rewinds. Read `guard` first."""
