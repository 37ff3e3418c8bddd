"""Where a run's loss starts and what it starts with: its level at chance, and how long its queue takes to fill."""

import math

import torch
from torch import nn

from sslkit.doctor.chance_losses import chance_level
from sslkit.methods import find_method
from sslkit.recipe.resolve import Recipe


def chance_of(recipe: Recipe, num_images: int) -> tuple[float, str] | None:
    """The loss on embeddings that know nothing of each other and its formula, or None where it is not known.

    Directions that a method adds up are added up here too. No weight is allocated.

    Args:
        recipe: Whose method, options and batch.
        num_images: Images of the data: the rows of a memory bank.
    """
    with torch.device("meta"):
        # The level depends on the embeddings' width, not on the features': any backbone does.
        method = find_method(recipe.method_name)(nn.Identity(), 8, recipe.method)
        method.meet_data(num_images)
    return chance_level(method, recipe.train.batch_size)


def queue_full_at(recipe: Recipe) -> int:
    """Updates until a queue holds keys of the teacher only, and none of its first random ones; 0 without a queue.

    Known for MoCo's queue, to which each update pushes the batch's keys, of both views if the loss is symmetric. SwAV's
    opens in mid-training.
    """
    size = getattr(recipe.method, "queue_size", 0)
    if not size or hasattr(recipe.method, "queue_start_epoch"):
        return 0
    keys = recipe.train.batch_size * (2 if getattr(recipe.method, "symmetric", False) else 1)
    return math.ceil(size / keys)
