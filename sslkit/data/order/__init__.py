"""Which samples are in which batch: pure functions of the seed and the epoch.

Read `epoch_order` first, then `sampler`.
"""
