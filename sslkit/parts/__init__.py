"""Parts that methods are made of: backbone, heads, losses, momentum teacher, queue, memory bank, schedules.

They import only `sslkit.distributed`, `sslkit.hub` and `sslkit.errors`. Read `momentum_teacher` and `losses` first.
"""
