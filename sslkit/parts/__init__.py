"""Parts that methods are made of: backbone, heads, teacher, queue, losses, collectives, schedules."""
