"""Which layers of a backbone are trained, and at which rate, by the order that timm gives to a model's parameters."""

from collections import defaultdict

from timm.models import group_parameters
from torch import nn

from sslkit.errors import UserError, first_line
from sslkit.text import pluralize


def parameter_depths(model: nn.Module, key: str) -> dict[str, int]:
    """The layer of each parameter by name, from 0 (the stem), as timm counts layers.

    Raises:
        UserError: timm does not say it of this model. The message names the ``key`` of ``[adapt]``.
    """
    try:
        matcher = model.group_matcher(coarse=False)  # type: ignore[operator]
        depths: dict[str, int] = group_parameters(model, matcher, reverse=True)
    except Exception as error:  # a model without the method, or one that refuses: any exception
        raise UserError(
            f"[adapt] {key}: timm does not give the order of this model's layers ({first_line(error)}); leave it out"
        ) from error
    return depths


def train_last_blocks(model: nn.Module, count: int) -> None:
    """Stop the gradient at all parameters but those of the ``count`` last blocks and of the layers after them.

    A block is a layer with a number in its name, such as ``blocks.11`` or ``layer4.1``.
    """
    layers = defaultdict(list)
    for name, depth in parameter_depths(model, "last_blocks").items():
        layers[depth].append(name)
    blocks = [depth for depth in sorted(layers) if any(_is_numbered(name) for name in layers[depth])]
    if count > len(blocks):
        raise UserError(f"[adapt] last_blocks: {count}, but the model has {pluralize(len(blocks), 'block')}")
    for depth, names in layers.items():
        if depth < blocks[-count]:
            for name in names:
                model.get_parameter(name).requires_grad_(False)


def _is_numbered(name: str) -> bool:
    """Whether a parameter belongs to an element of a list, or of a stage with a number, such as ``layer4.0``."""
    return any(part.isdigit() for part in name.split("."))


def rate_multipliers(model: nn.Module, decay: float) -> dict[str, float]:
    """Layer-wise decay: for each parameter, ``decay`` to the number of layers after its own."""
    depths = parameter_depths(model, "layer_decay")
    last = max(depths.values())
    return {name: decay ** (last - depth) for name, depth in depths.items()}
