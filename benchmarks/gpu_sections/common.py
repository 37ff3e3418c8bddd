"""What the sections share: the plan, recipes, and a training state on the device."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from sslkit.data.batch import Batch
from sslkit.data.sources.image_source import open_source
from sslkit.engine.accelerator import make_accelerator
from sslkit.engine.resilience.guard import Guard
from sslkit.engine.runtime.precision import restored_backends
from sslkit.engine.setup import set_up_training
from sslkit.engine.state import TrainingState
from sslkit.engine.step import guard_of
from sslkit.methods import METHODS
from sslkit.recipe.resolve import Recipe, build_recipe, load_recipe

Row = dict[str, Any]
DATA = {"path": "builtin:fashion_mnist", "split": "test", "workers": 0}
SMALL_OPTIONS: dict[str, dict[str, Any]] = {
    "moco_v1": {"queue_size": 96, "dim": 16, "bn_groups": 2},
    "moco_v2": {"queue_size": 96, "dim": 16, "bn_groups": 2},
    "moco_v3": {"hidden_dim": 32, "dim": 16},
    "simclr": {"dim": 16},
    "byol": {"hidden_dim": 32, "dim": 16},
    "swav": {"hidden_dim": 32, "dim": 16, "prototypes": 12, "freeze_prototypes_steps": 2},
    "instdisc": {"dim": 16, "negatives": 24},
    "end_to_end": {"dim": 16, "bn_groups": 2},
    "memory_bank": {"dim": 16, "negatives": 24},
}


@dataclass(frozen=True)
class Plan:
    """Where and how large to run."""

    device: torch.device
    toy: bool  # sizes at which figures mean nothing
    deadline: float  # of `time.monotonic`

    def seconds_left(self) -> float:
        """Time left."""
        return self.deadline - time.monotonic()

    @property
    def methods(self) -> list[str]:
        """The methods to check."""
        return ["moco_v2", "swav"] if self.toy else list(METHODS)


def small_recipe(name: str, **tables: dict[str, Any]) -> Recipe:
    """A recipe of a method on a tiny backbone and 32 px, by itself right on any device."""
    backbone = "test_vit" if name == "moco_v3" else "test_resnet"
    crops = {"small_crops": 2, "small_size": 32, "small_scale": [0.1, 0.4]} if name == "swav" else {}
    base: dict[str, dict[str, Any]] = {
        "method": {"name": name, **SMALL_OPTIONS[name]},
        "backbone": {"name": backbone},
        "data": DATA,
        "views": {"policy": "small_gray", "size": 32, **crops},
        "optim": {"name": "sgd", "lr": 0.05, "lr_rule": "none", "weight_decay": 1e-4},
        "train": {"epochs": 1, "batch_size": 32, "max_steps": 6, "log_every": 1, "precision": "no", "tf32": False},
        "checkpoint": {"every_minutes": 0},
        "schedule": {"warmup_epochs": 0},
    }
    for table, keys in tables.items():
        base[table] = {**base.get(table, {}), **keys}
    return build_recipe(base, name="small recipe")


def paper_recipe(plan: Plan, name: str, batch: int, *stated: str, folder: Path | None = None) -> Recipe:
    """A shipped recipe with another batch, on a folder's images or the bundled ones; at toy size a tiny backbone."""
    words = [f"data.path={folder or DATA['path']}", f"train.batch_size={16 if plan.toy else batch}"]
    words += ["data.workers=0", "monitor.diagnose_every=0", *stated]
    if plan.toy:
        tiny = "test_vit" if "vit" in name else "test_resnet"
        words += [f"backbone.name={tiny}", "views.size=32"] + (["method.queue_size=96"] if "mocov2" in name else [])
    return load_recipe(name, words)


@contextmanager
def training(recipe: Recipe) -> Iterator[tuple[TrainingState, Guard]]:
    """A training state on the device, in training mode."""
    with restored_backends():
        accelerator = make_accelerator(recipe)
        try:
            state = set_up_training(recipe, open_source(recipe.data).without_labels(), accelerator)
            state.method.train()
            yield state, guard_of(state)
        finally:
            accelerator.end_training()
            AcceleratorState._reset_state(reset_partial_state=True)


def random_batch(state: TrainingState, seed: int = 0) -> Batch:
    """A batch of random pixels on the device."""
    generator = torch.Generator().manual_seed(seed)
    size = state.recipe.train.batch_size
    views = [
        torch.randint(256, (size, each.size, each.size, 3), dtype=torch.uint8, generator=generator)
        for each in state.recipe.views.view_policies()
    ]
    device = state.accelerator.device
    return Batch([view.to(device) for view in views], torch.arange(size, device=device))


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def largest_difference(one: Tensor, other: Tensor) -> float:
    """The largest difference relative to the largest value."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-12))


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of all tensors over the norm of all."""
    squares = [(each.double().cpu() - other[name].double().cpu()).square().sum().item() for name, each in one.items()]
    return math.sqrt(sum(squares) / sum(each.double().square().sum().item() for each in one.values()))


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> Sequence[str]:
    """Names of the tensors that are not equal bit for bit."""
    return [name for name in first if not torch.equal(first[name].cpu(), second[name].cpu())]
