"""The first layers of a run's projector, which SimCLR v2 fine-tunes together with the backbone."""

from pathlib import Path

from torch import nn

from sslkit.engine.checkpoint.format import newest_checkpoint
from sslkit.engine.setup import build_method
from sslkit.errors import UserError
from sslkit.parts.backbone import check_backbone_size
from sslkit.recipe.resolve import load_recipe
from sslkit.text import pluralize


def first_projector_layers(run: Path, count: int) -> nn.Sequential:
    """The first ``count`` linear layers of a run's projector, from its newest checkpoint (SimCLR v2: 1).

    Each comes with the norm and activation after it: (B, D) -> (B, width of the last layer kept). Raises a UserError if
    the folder is not a run, or its projector has too few layers.
    """
    if not (run / "recipe.toml").is_file():
        raise UserError(f"--head-layers: {run} is not a run folder, and an encoder alone has no projector")
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise UserError(f"--head-layers: {run} holds no checkpoint to read its projector from")
    recipe = load_recipe(str(run / "recipe.toml"))
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.model.items()}
    check_backbone_size(recipe.backbone_config(), shapes, f"{run / 'recipe.toml'} [backbone]")
    method = build_method(recipe)
    head = method.heads[0] if method.heads else ""
    projector = method.get_submodule(head) if head else nn.Identity()
    layers = list(projector) if isinstance(projector, nn.Sequential) else [projector]
    linear = [place for place, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    if not 0 < count < len(linear):
        raise UserError(
            f"--head-layers {count}: the projector of {run} has {pluralize(len(linear), 'linear layer')}, and the last "
            "is never kept"
        )
    own = f"{head}."
    weights = {key.removeprefix(own): value for key, value in checkpoint.model.items() if key.startswith(own)}
    try:
        projector.load_state_dict(weights)
    except RuntimeError as error:
        last = str(error).splitlines()[-1][:300]
        raise UserError(f"--head-layers: the projector in {run} does not fit its recipe: {last}") from error
    return nn.Sequential(*layers[: linear[count]])
