"""With several processes: are weights, queue and bank the same on all of them after a few steps?"""

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sslkit.data.sources.image_source import ImageSource
from sslkit.distributed.collectives import gather_rows, world_size
from sslkit.doctor.findings import Finding, fault, first_line, judge, not_applicable
from sslkit.engine.accelerator import make_accelerator
from sslkit.engine.resilience.guard import Guard
from sslkit.engine.setup import build_method, make_train_loader, set_up_training
from sslkit.engine.step import train_step
from sslkit.errors import UserError
from sslkit.methods import Method
from sslkit.recipe.resolve import Recipe

AGREE = "processes agree"

IMAGES_EACH, STEPS = 8, 2
OWN_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def launched() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def not_launched() -> Finding:
    """What one process can say of it."""
    return not_applicable(
        AGREE,
        "not checked: this is one process. Start the doctor as the run will be, such as torchrun --nproc_per_node 2 -m "
        "sslkit doctor RECIPE",
    )


def check_processes(recipe: Recipe, source: ImageSource) -> Finding:
    """`train_and_compare` in a process group that is taken down again: what follows runs on each process alone."""
    accelerator = make_accelerator(recipe)
    try:
        return train_and_compare(accelerator, recipe, source)
    except UserError:
        raise
    except Exception as error:
        return fault(AGREE, f"the method stops on {world_size()} processes: {first_line(error)}")
    finally:
        accelerator.end_training()
        accelerator.state._reset_state(reset_partial_state=True)


def train_and_compare(accelerator: Any, recipe: Recipe, source: ImageSource) -> Finding:
    """Train a few steps on all processes and compare checksums of everything that must be the same."""
    images_each = min(IMAGES_EACH, recipe.train.batch_size // world_size())
    groups_each = 2 if images_each % 4 == 0 else 1
    small = small_run(recipe, images_each * world_size())
    torch.manual_seed(recipe.train.seed)
    method = build_method(recipe, len(source)).train()
    method.bn_groups = min(method.bn_groups, groups_each * world_size())
    state = set_up_training(small, source, accelerator, method=method)
    guard = Guard(small.guard, state.recovery, method)
    for batch in make_train_loader(state):
        result = train_step(state, batch, guard)
        if result.problem:
            return fault(AGREE, f"step {result.step} on {world_size()} processes: {result.problem}")
    return compare(method)


def small_run(recipe: Recipe, batch_size: int) -> Recipe:
    """The recipe with a few steps of a small batch, all at its peak learning rate."""
    train = {"batch_size": batch_size, "epochs": STEPS, "max_steps": STEPS, "head_warmup_epochs": 0.0}
    train |= {"micro_batch": 0, "compile": False, "shard": False}
    return replace(
        recipe,
        train=recipe.train.model_copy(update=train),
        data=recipe.data.model_copy(update={"workers": 0}),
        optim=recipe.optim.model_copy(update={"lr": recipe.peak_lr, "lr_rule": "none"}),
        schedule=recipe.schedule.model_copy(update={"warmup_epochs": 0.0, "decay": "constant"}),
    )


def compare(method: Method) -> Finding:
    """Every weight and buffer by its checksum; running statistics may be a process's own."""
    state = {name: value for name, value in method.state_dict().items() if not name.endswith(OWN_STATISTICS)}
    mine = torch.stack([checksum(value) for value in state.values()])
    all_sums = gather_rows(mine[None])
    differ = [name for name, sums in zip(state, all_sums.unbind(dim=1), strict=True) if (sums != sums[0]).any()]
    parts = list(dict.fromkeys(name.split(".")[0] for name in differ))
    return judge(
        AGREE,
        [f"after {STEPS} steps {part} differs between the processes: gather what is kept" for part in parts],
        f"weights, teacher and dictionary are equal on {world_size()} processes after {STEPS} steps",
    )


def checksum(tensor: Tensor) -> Tensor:
    """() int64: the tensor's bytes, each row's weighed by its number."""
    rows = tensor.detach().contiguous().reshape(len(tensor) if tensor.ndim else 1, -1)
    sums = rows.view(torch.uint8).sum(dim=1, dtype=torch.int64)
    return (sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum()
