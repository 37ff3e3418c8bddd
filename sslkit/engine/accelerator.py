"""The processes of a run: whether as many started as were asked for, and how they share the machine."""

import os
import re
import warnings
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from sslkit.data.loading.loader import resolve_workers
from sslkit.distributed.collectives import processes_started
from sslkit.distributed.failures import group_timeout
from sslkit.distributed.rendezvous import rendezvous_url
from sslkit.engine.runtime.precision import chosen_precision, set_backends, training_device
from sslkit.errors import UserError
from sslkit.recipe.resolve import Recipe


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Join the processes that the launcher started.

    DistributedDataParallel need not broadcast buffers at every step: a queue is equal on all processes, and evaluation
    and export use the running statistics of the first process.

    Raises:
        UserError: The number of processes is not the one that the recipe or the launcher's command asks for, or the
            precision needs a GPU and there is none.
    """
    started = processes_started()
    asked = recipe.train.processes or _asked_of_launcher()
    if asked and asked != started:
        raise UserError(
            f"{asked} processes were asked for and {started} started; on CPUs `accelerate launch --cpu` starts only "
            f"one: use `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked} ...` or "
            f"`torchrun --standalone --nproc_per_node {asked} ...`"
        )
    precision = chosen_precision(recipe)
    if precision == "fp16" and training_device().type == "cpu":
        raise UserError("[train] precision: 'fp16' needs a GPU; on CPUs take 'no' or 'bf16'")
    # torch 2.15 deprecates the name by which accelerate passes this option.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    # FSDP2 gathers in low precision itself; autocast would keep a copy of all weights until the backward pass.
    sharded = recipe.train.shard and started > 1
    accelerator = Accelerator(
        mixed_precision="no" if sharded else precision,
        cpu=True if training_device().type == "cpu" else None,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(
                init_method=rendezvous_url(),
                timeout=group_timeout(recipe.guard.timeout_seconds, on_gpu=training_device().type == "cuda"),
            ),
        ],
    )
    set_backends(recipe.train.tf32, accelerator.device.type)
    return accelerator


def processes_here() -> int:
    """Number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def workers_of(recipe: Recipe, accelerator: Accelerator) -> int:
    """Number of data workers of each process."""
    return resolve_workers(
        recipe.data.workers, on_accelerator=accelerator.device.type != "cpu", processes_here=processes_here()
    )


def _asked_of_launcher() -> int:
    """The --num_processes of the `accelerate launch` that started this process on one machine; 0 if there is none."""
    if "WORLD_SIZE" in os.environ:
        return 0
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace")
    except OSError:  # not on Linux
        return 0
    of_launcher = command.partition(".pretrain\0")[0]
    found = re.search(r"accelerate[^\0]*\0launch\0.*?--num[_-]processes[=\0](\d+)\0", of_launcher, re.DOTALL)
    return int(found[1]) if found else 0
