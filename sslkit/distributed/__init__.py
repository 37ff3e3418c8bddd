"""What processes need of each other: collectives, sharded weights, consistency checks and failure detection.

Read `collectives` first.
"""
