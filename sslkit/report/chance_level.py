"""The loss of a run at chance, and the number of steps until its queue is full."""

import math

import torch
from torch import nn

from sslkit.doctor.chance_losses import chance_level
from sslkit.methods import find_method
from sslkit.recipe.resolve import Recipe


def chance_of(recipe: Recipe, num_images: int) -> tuple[float, str] | None:
    """The loss on random embeddings and its formula; None if the method does not know it.

    If the method sums the losses of several directions, so does this. No weights are allocated.

    Args:
        recipe: Gives the method, its options and the batch size.
        num_images: Number of images of the data: the size of a memory bank.
    """
    with torch.device("meta"):
        # The loss at chance depends on the width of the embeddings, not of the features: any backbone will do.
        method = find_method(recipe.method_name)(nn.Identity(), 8, recipe.method)
        method.meet_data(num_images)
    return chance_level(method, recipe.train.batch_size)


def queue_full_at(recipe: Recipe) -> int:
    """Steps until the queue has no more of its initial random keys; 0 without a queue.

    This is for MoCo's queue: each step adds the keys of the batch, of both views if the loss is symmetric. SwAV's queue
    starts later in training.
    """
    size = getattr(recipe.method, "queue_size", 0)
    if not size or hasattr(recipe.method, "queue_start_epoch"):
        return 0
    keys = recipe.train.batch_size * (2 if getattr(recipe.method, "symmetric", False) else 1)
    return math.ceil(size / keys)
