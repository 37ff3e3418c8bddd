"""Every random draw of a run depends on a key alone, so that no draw depends on what was drawn before it."""

from enum import IntEnum

import numpy as np


class DrawPurpose(IntEnum):
    """What a draw is for: one word of its key, so that draws for different purposes never share a stream.

    The values are part of what makes a run reproducible. Never change one; give a new purpose a new value.
    """

    VIEWS = 0
    SHUFFLE = 1
    DROPOUT = 2
    REPLACEMENT = 3
    PACKING = 4
    MIXTURE = 5
    STREAM_ORDER = 6
    USER_PIPELINE = 7
    FINETUNE_DROPOUT = 0xD409
    LABEL_SUBSET = 0x5B5E7


def draw_seed(*key: int) -> int:
    """The 63-bit seed of a key: the run's seed, a `DrawPurpose`, and what tells its draws apart."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
