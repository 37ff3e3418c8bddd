"""The recipe of an adaptation. Its numbers come from the experiments in docs/adapt.md."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sslkit.adapt.start_weights import Start
from sslkit.data.sources.image_source import ImageSource
from sslkit.doctor.image_checks import ImageSummary, summarise_images
from sslkit.errors import UserError
from sslkit.methods.method_options import negatives_below, power_of_two
from sslkit.recipe.resolve import Recipe, build_recipe

GRID = 32  # the size of the input is a multiple of it
MIN_IMAGES = 16
MAX_BATCH, MIN_BATCH = 64, 8
STEPS_PER_EPOCH = 16  # at least, where there are enough images
MAX_QUEUE = 4096
ANCHOR_FACTOR = 2.5  # docs/adapt.md
POINTS = 4  # of the run that are judged
LAST_BLOCKS, LORA_RANK = 2, 8
WAYS: dict[str, dict[str, Any]] = {
    "all": {"freeze_batch_norm": True},
    "last": {"last_blocks": LAST_BLOCKS},
    "lora": {"lora_rank": LORA_RANK},
}
# Where the weights know larger images than these, the frozen start teaches their features: it sees each view enlarged.
LARGER_TEACHES: dict[str, Any] = {
    "adapt": {"anchor": 30.0},
    "views": {"crop_scale": [0.8, 1.0], "jitter_prob": 0.0, "gray_prob": 0.0},
    "lr": 1e-3,
    "head_warmup": 0.0,
}
# Elsewhere the method teaches, and the start only holds.
STAYS_NEAR: dict[str, Any] = {
    "adapt": {"anchor": 1.0, "layer_decay": 0.75},
    "views": {"crop_scale": [0.3, 1.0]},
    "lr": 1e-4,
    "head_warmup": 0.1,  # of the epochs: fresh heads have nothing to say to the backbone
}


@dataclass(frozen=True)
class Wishes:
    """What the user asked for; 0 and empty are left to the command.

    Attributes:
        way: ``all`` layers, the ``last`` blocks, or ``lora``.
        size: Side of the input in pixels.
        epochs: Passes over the images.
        stated: Further keys of the recipe, which win over everything else.
    """

    way: str = "all"
    size: int = 0
    epochs: int = 0
    stated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise UserError(f"--way {self.way}: must be one of {', '.join(WAYS)}")


def input_sizes(start: Start, images: ImageSummary, size: int = 0) -> list[int]:
    """Sizes at which the untouched encoder is judged, ascending: the images' own, 1.5 and 2 times it, and its own.

    With a ``size``, that and twice it. None is larger than what the encoder was trained on, unless it is asked for.
    """
    own = size or min(_on_grid(min(images.height, images.width)), start.native_size)
    factors = (1.0, 2.0) if size else (1.0, 1.5, 2.0)
    wanted = {_on_grid(factor * own) if factor > 1.0 else own for factor in factors}
    return [own, *sorted(each for each in wanted | {start.native_size} if own < each <= start.native_size)]


def _on_grid(side: float) -> int:
    return max(int(-(-side // GRID)), 1) * GRID


def anchor_size(start: Start, size: int) -> int:
    """Size at which the frozen start sees the views: 2.5 times the student's, up to its own; 0 if that is no larger."""
    larger = min(_on_grid(ANCHOR_FACTOR * size), start.native_size)
    return larger if larger > size else 0


def kept_every(epochs: int) -> int:
    """Every how many epochs a checkpoint is kept, to be judged: about `POINTS` in all, or each of a short run."""
    return max(epochs // POINTS, 1)


def look_at(source: ImageSource, option: str) -> ImageSummary:
    """A sample of the images; a UserError if there are too few to train on."""
    if len(source) < MIN_IMAGES:
        raise UserError(
            f"{option}: {source.description} has {len(source)} images; adapting needs {MIN_IMAGES} or more. Use the "
            "weights as they are"
        )
    return summarise_images(source)


def adaptation_recipe(start: Start, data: Mapping[str, Any], images: ImageSummary, size: int, wishes: Wishes) -> Recipe:
    """The recipe: a small learning rate, weak views, BatchNorm's statistics and features held near the start's.

    Args:
        start: The weights.
        data: The ``[data]`` table.
        images: What the images are.
        size: Side of the views in pixels.
        wishes: What the user asked for.

    Raises:
        UserError: A stated key is wrong, or the way does not fit the encoder.
    """
    larger = anchor_size(start, size)
    batch = power_of_two(min(max(images.count / STEPS_PER_EPOCH, MIN_BATCH), MAX_BATCH))
    epochs = wishes.epochs or 1
    grey = {"jitter": [0.2, 0.2, 0.0, 0.0], "gray_prob": 0.0}
    colour = {"jitter": [0.2, 0.2, 0.2, 0.05], "gray_prob": 0.1}
    how = LARGER_TEACHES if larger else STAYS_NEAR
    tables: dict[str, dict[str, Any]] = {
        "method": {
            "name": "moco_v2",
            "bn_groups": 1,
            "momentum": 0.99,
            "queue_size": max(negatives_below(images.count, MAX_QUEUE), batch),
        },
        "backbone": start.backbone,
        "adapt": {**WAYS[wishes.way], **how["adapt"], "anchor_size": larger},
        "data": dict(data),
        "views": {
            **{"policy": "moco_v2", "size": size, "crop_pct": 1.0, "blur_prob": 0.0},
            **(grey if images.grey else colour),
            **how["views"],
            **start.views,
        },
        "optim": {"name": "adamw", "lr": how["lr"], "lr_rule": "none", "weight_decay": 0.0},
        "schedule": {"decay": "cosine", "warmup_epochs": epochs / 10, "per": "step"},
        "train": {
            "batch_size": batch,
            "epochs": epochs,
            "head_warmup_epochs": how["head_warmup"] * epochs,
            "log_every": 10,
        },
        "monitor": {"diagnose_every": 0},
        "checkpoint": {"keep_every_epochs": kept_every(epochs), "keep": 1},
    }
    recipe = build_recipe(tables, list(wishes.stated), name="adapt")
    for option, key, wanted, found in (
        ("--size", "views.size", size, recipe.views.size),
        ("--epochs", "train.epochs", epochs, recipe.train.epochs),
    ):
        if wanted != found:
            raise UserError(f"--set {key}={found}: give {option} {found} instead")
    return recipe
