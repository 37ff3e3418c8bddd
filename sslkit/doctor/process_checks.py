"""With several processes: are weights, queue and bank the same on all of them after a few steps?"""

import os
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslkit.data.augment.cpu import ViewPipeline, normalise
from sslkit.data.augment.gpu import finish_on
from sslkit.data.loading.loader import Batch, GlobalBatches, make_loader
from sslkit.data.sources.image_source import ImageSource
from sslkit.distributed.collectives import gather_rows, world_size
from sslkit.doctor.findings import Finding, fault, first_line, judge, not_applicable
from sslkit.engine.accelerator import make_accelerator
from sslkit.engine.optim import make_optimizer, set_learning_rate
from sslkit.engine.rng import SHUFFLE
from sslkit.engine.setup import build_method
from sslkit.engine.step import GlobalBatch, whole_batch_step
from sslkit.errors import UserError
from sslkit.methods import BatchInfo, Method, Progress
from sslkit.parts.batchnorm import has_batch_norm
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
    torch.manual_seed(recipe.train.seed)
    method = build_method(recipe, len(source)).train()
    images_each = min(IMAGES_EACH, recipe.train.batch_size // world_size())
    groups_each = 2 if images_each % 4 == 0 else 1
    method.bn_groups = min(method.bn_groups, groups_each * world_size())
    if has_batch_norm(method):
        method.synchronise_batch_norm(accelerator.device)
    method.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    wrapped, optimizer = accelerator.prepare(method, make_optimizer(recipe, method))
    set_learning_rate(optimizer, recipe.peak_lr)
    batches = GlobalBatches(
        len(source),
        images_each * world_size(),
        recipe.train.seed,
        rank=accelerator.process_index,
        world_size=world_size(),
        total_steps=STEPS,
        plan=source.plan,
    )
    pipeline = ViewPipeline(recipe.views, recipe.train.seed)
    for step, batch in enumerate(make_loader(source, pipeline, batches, workers=0, pin_memory=False)):
        here = global_batch(recipe, method, batch, Progress(step, STEPS), accelerator.device)
        whole_batch_step(accelerator, wrapped, here)
        method.before_update(Progress(step, STEPS))
        optimizer.step()
        optimizer.zero_grad()
        method.after_update(Progress(step + 1, STEPS))
    return compare(method)


def global_batch(recipe: Recipe, method: Method, batch: Batch, progress: Progress, device: torch.device) -> GlobalBatch:
    """This process's part of a small global batch."""
    count = len(batch.sample_ids) * world_size()
    order = np.random.default_rng([recipe.train.seed, SHUFFLE, progress.updates, 0, 0]).permutation(count)
    here = finish_on(device, batch, recipe.views)
    return GlobalBatch(
        here.views,
        BatchInfo(here.sample_ids),
        progress,
        order if method.shuffle_keys else None,
        partial(normalise, mean=recipe.views.mean, std=recipe.views.std),
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
