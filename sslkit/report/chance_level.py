"""Where a run's loss starts and what it starts with: its level at chance, and how long its queue takes to fill."""

import torch
from torch import nn

from sslkit.methods import Method, find_method
from sslkit.recipe.resolve import Recipe


def chance_of(recipe: Recipe, num_images: int) -> tuple[float, str] | None:
    """The loss on embeddings that know nothing of each other and its formula, or None where it is not known.

    Directions that a method adds up are added up here too. No weight is allocated.

    Args:
        recipe: Whose method, options and batch.
        num_images: Images of the data: the rows of a memory bank.
    """
    chance = _without_weights(recipe, num_images).chance_loss(recipe.train.batch_size)
    return (chance.value, chance.formula) if chance is not None else None


def queue_full_at(recipe: Recipe) -> int:
    """Updates until a queue of negatives holds keys of the teacher only; 0 without such a queue."""
    return _without_weights(recipe).updates_to_fill_queue(recipe.train.batch_size)


def _without_weights(recipe: Recipe, num_images: int = 1) -> Method:
    """The method on the meta device. The backbone does not matter to the loss at chance or to the queue."""
    with torch.device("meta"):
        method = find_method(recipe.method_name)(nn.Identity(), 8, recipe.method)
        method.meet_data(num_images)
    return method
