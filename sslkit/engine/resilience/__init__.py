"""What a run does when something goes wrong: bad steps, signals, crash dumps, replay. Read `guard` first."""
