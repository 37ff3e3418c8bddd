"""The loss of a run at chance, and the number of steps until its queue is full."""

import torch
from torch import nn

from sslkit.methods import Method, find_method
from sslkit.recipe.resolve import Recipe


def chance_of(recipe: Recipe, num_images: int) -> tuple[float, str] | None:
    """The loss on random embeddings and its formula; None if the method does not know it.

    A memory bank has ``num_images`` entries. If the method sums the losses of several directions, so does this.
    """
    chance = _without_weights(recipe, num_images).chance_loss(recipe.train.batch_size)
    return (chance.value, chance.formula) if chance is not None else None


def queue_full_at(recipe: Recipe) -> int:
    """Steps until a queue of negatives holds keys of the teacher only; 0 without such a queue."""
    return _without_weights(recipe).updates_to_fill_queue(recipe.train.batch_size)


def _without_weights(recipe: Recipe, num_images: int = 1) -> Method:
    """The method on the meta device. Neither the loss at chance nor the queue depends on the backbone."""
    with torch.device("meta"):
        method = find_method(recipe.method_name)(nn.Identity(), 8, recipe.method)
        method.set_num_samples(num_images)
    return method
