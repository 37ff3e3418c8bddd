"""Parts that methods are made of: backbone, heads, losses, momentum teacher, queue, memory bank, schedules.

Each works without the rest of sslkit. Read `momentum_teacher` and `losses` first.
"""
