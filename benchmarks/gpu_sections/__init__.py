"""The sections of `gpu.py`. Each has a function ``run(plan)`` that returns rows of a table."""
