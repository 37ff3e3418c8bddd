"""With several processes: are weights, teachers, queue and memory bank equal on all of them after a few steps?"""

from dataclasses import replace
from typing import Any

import torch

from sslkit.data.sources.image_source import ImageSource
from sslkit.distributed.collectives import world_size
from sslkit.distributed.consistency import compare_weights
from sslkit.doctor.findings import Check, Finding, describe_error
from sslkit.engine.accelerator import make_accelerator
from sslkit.engine.resilience.guard import Guard
from sslkit.engine.runtime.precision import restored_backends
from sslkit.engine.setup import build_method, make_train_loader, set_up_training
from sslkit.engine.step import train_step
from sslkit.errors import RunError, UserError
from sslkit.recipe.resolve import Recipe

AGREE = Check("processes agree")
NOT_LAUNCHED = AGREE.not_applicable(
    "not checked on 1 process; to check it, run torchrun --nproc_per_node 2 -m sslkit doctor RECIPE"
)

IMAGES_PER_PROCESS, STEPS = 8, 2


@restored_backends()
def check_processes(recipe: Recipe, source: ImageSource) -> Finding:
    """`train_and_compare` in a process group of its own: later checks run on each process alone."""
    accelerator = make_accelerator(recipe)
    try:
        return train_and_compare(accelerator, recipe, source)
    except UserError:
        raise
    except Exception as error:
        return AGREE.fault(f"the method stops on {world_size()} processes with {describe_error(error)}")
    finally:
        accelerator.end_training()
        accelerator.state._reset_state(reset_partial_state=True)


def train_and_compare(accelerator: Any, recipe: Recipe, source: ImageSource) -> Finding:
    """Make a few training steps on all processes, and compare weights, teachers, queues and memory banks."""
    images_each = min(IMAGES_PER_PROCESS, recipe.train.batch_size // world_size())
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
            return AGREE.fault(f"step {result.step} on {world_size()} processes: {result.problem}")
    try:
        compare_weights(method, STEPS, accelerator.device)
    except RunError as error:
        difference = str(error).partition(". ")[0]
        return AGREE.fault(f"{difference}: gather the rows of all processes before storing them")
    return AGREE.ok(f"weights, teachers and dictionaries are equal on {world_size()} processes after {STEPS} steps")


def small_run(recipe: Recipe, batch_size: int) -> Recipe:
    """The recipe with a few steps of a small batch, at its peak learning rate."""
    train = {"batch_size": batch_size, "epochs": STEPS, "max_steps": STEPS, "head_warmup_epochs": 0.0}
    train |= {"micro_batch": 0, "compile": False, "shard": False}
    return replace(
        recipe,
        train=recipe.train.model_copy(update=train),
        data=recipe.data.model_copy(update={"workers": 0}),
        optim=recipe.optim.model_copy(update={"lr": recipe.peak_lr, "lr_rule": "none"}),
        schedule=recipe.schedule.model_copy(update={"warmup_epochs": 0.0, "decay": "constant"}),
    )
