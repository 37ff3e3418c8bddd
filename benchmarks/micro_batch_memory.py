"""Peak memory of one step of MoCo v3 by batch size, for the whole batch and in slices of a fixed size.

Each cell runs in a separate process. On CPUs the peak is that of resident memory, minus what the process uses before
the step; on GPUs it is that of allocated memory. The images are included, as in training.

    python benchmarks/micro_batch_memory.py [--slice 64] [--largest 4096] [--whole-up-to 1024]
"""

import argparse
import functools
import json
import resource
import subprocess
import sys

import torch
from accelerate import Accelerator

from sslkit.data.augment.cpu import normalise
from sslkit.data.augment.policies import IMAGENET_MEAN, IMAGENET_STD
from sslkit.engine.gradient_cache import GlobalBatch, sliced_step, whole_batch_step
from sslkit.engine.setup import build_method
from sslkit.methods import BatchInfo
from sslkit.parts.schedules import Progress
from sslkit.recipe.resolve import build_recipe

SIDE = 96


def resident_mib() -> float:
    """Peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(batch: int, micro_batch: int) -> dict[str, float]:
    """Peak memory of one step, in MiB, and its loss."""
    accelerator = Accelerator()
    recipe = build_recipe(
        {
            "method": {"name": "moco_v3", "hidden_dim": 256, "dim": 64},
            "backbone": {"name": "test_vit"},
            "data": {"path": "builtin:fashion_mnist"},
            "views": {"size": SIDE},
        }
    )
    torch.manual_seed(0)
    method = build_method(recipe).to(accelerator.device)
    views = [torch.randint(256, (batch, SIDE, SIDE, 3), dtype=torch.uint8) for _ in range(2)]
    prepare = functools.partial(normalise, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    here = GlobalBatch(
        [view.to(accelerator.device) for view in views], BatchInfo(torch.arange(batch)), Progress(0, 1), None, prepare
    )
    before = resident_mib()
    if micro_batch:
        step = sliced_step(accelerator, method, here, micro_batch, lambda _: None)
    else:
        step = whole_batch_step(accelerator, method, here)
    on_gpu = accelerator.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident_mib() - before
    return {"mib": peak, "loss": step.loss.item()}


def in_a_process(batch: int, micro_batch: int) -> dict[str, float]:
    """Run `measure` in a new process."""
    command = [sys.executable, __file__, "--cell", str(batch), str(micro_batch)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    cell: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return cell


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", type=int, nargs=2)
    parser.add_argument("--slice", type=int, default=64)
    parser.add_argument("--largest", type=int, default=4096)
    parser.add_argument("--whole-up-to", type=int, default=1024)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(measure(*arguments.cell)))
        return
    print(f"| batch | whole batch, MiB | in slices of {arguments.slice}, MiB | loss whole | loss in slices |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    batch = 256
    while batch <= arguments.largest:
        sliced = in_a_process(batch, arguments.slice)
        whole = in_a_process(batch, 0) if batch <= arguments.whole_up_to else None
        figures = (f"{whole['mib']:.0f}", f"{whole['loss']:.6f}") if whole else ("not run", "not run")
        print(f"| {batch} | {figures[0]} | {sliced['mib']:.0f} | {figures[1]} | {sliced['loss']:.6f} |", flush=True)
        batch *= 2


if __name__ == "__main__":
    main()
