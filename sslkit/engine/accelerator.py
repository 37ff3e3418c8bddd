"""The processes of a run: whether as many started as were asked for, and how they share the machine."""

import os
import re
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from sslkit.data.loading.loader import resolve_workers
from sslkit.distributed.collectives import processes_started
from sslkit.distributed.failures import group_timeout
from sslkit.distributed.rendezvous import rendezvous_url
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
    if recipe.train.precision == "fp16" and _only_cpu():
        raise UserError("[train] precision: 'fp16' needs a GPU; on CPUs take 'no' or 'bf16'")
    if recipe.train.tf32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    # torch 2.15 deprecates the name by which accelerate passes this option.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    return Accelerator(
        mixed_precision=recipe.train.precision,
        cpu=True if _only_cpu() else None,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(
                init_method=rendezvous_url(),
                timeout=group_timeout(recipe.guard.timeout_seconds, on_gpu=not _only_cpu()),
            ),
        ],
    )


def processes_here() -> int:
    """Number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def workers_of(recipe: Recipe, accelerator: Accelerator) -> int:
    """Number of data workers of each process."""
    return resolve_workers(
        recipe.data.workers, on_accelerator=accelerator.device.type != "cpu", processes_here=processes_here()
    )


def _only_cpu() -> bool:
    return not torch.cuda.is_available() and not torch.backends.mps.is_available()


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
