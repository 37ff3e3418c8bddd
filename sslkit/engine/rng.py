"""Every random draw of a step is a function of its key, so that none depends on what was drawn before."""

import numpy as np
import torch
from numpy.typing import NDArray

from sslkit.recipe.resolve import Recipe

SHUFFLE, DROPOUT = 1, 2  # what a draw is for, the second of five words of its key; views have 0


def draw_key(*words: int) -> int:
    """One 63-bit seed for a key of several words."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generators a forward pass draws from; torch.manual_seed takes 2 ms where CUDA sleeps."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def shuffle_order(recipe: Recipe, step: int) -> NDArray[np.int64]:
    """The permutation of a global batch's keys at ``step``, the same on every process."""
    generator = np.random.default_rng([recipe.train.seed, SHUFFLE, step, 0, 0])
    return generator.permutation(recipe.train.batch_size)
