"""Random draws of a training step; see `sslkit.random_draws`."""

import numpy as np
import torch
from numpy.typing import NDArray

from sslkit.random_draws import DrawPurpose
from sslkit.recipe.resolve import Recipe


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generators that a forward pass draws from; `torch.manual_seed` takes 2 ms while CUDA sleeps."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def shuffle_order(recipe: Recipe, step: int) -> NDArray[np.int64]:
    """The permutation of a global batch's keys (shuffling BN) at ``step``, the same on every process."""
    generator = np.random.default_rng([recipe.train.seed, DrawPurpose.SHUFFLE, step, 0, 0])
    return generator.permutation(recipe.train.batch_size)
