"""Multiple processes: bytes sent per step, counted and predicted by a formula, and weak scaling.

    python benchmarks/processes.py [--counts 2 4] [--backbone resnet18] [--side 64] [--batch 64]

Bytes are counted on the loopback device of a separate network namespace (Linux, root), including packet headers, and
divided by steps and processes. `sent_per_step` is the formula, also evaluated for more processes. Scaling is the images
per second of two single-threaded processes relative to two independent runs in parallel. These are the reference
because two cores of a shared machine often do not give twice the speed of one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from side_by_side import machine, table

from sslkit.data.sources.image_source import open_source
from sslkit.distributed.collectives import world_size
from sslkit.engine.accelerator import make_accelerator
from sslkit.engine.setup import make_train_loader, set_up_training
from sslkit.engine.steps_in_flight import steps_to_measure
from sslkit.profiling.stage_timer import StageTimer
from sslkit.profiling.step_profile import CPU, step
from sslkit.recipe.resolve import Recipe, build_recipe

STEPS, WARM_UP = 10, 3
FLOAT = 4  # bytes
VOTE = 16 * FLOAT  # the step's loss, flags and metrics
DIM = 128


def sent_per_step(processes: int, batch: int, params: int, side: int, dim: int = DIM) -> dict[str, float]:
    """Bytes that one process sends in a step of MoCo v2.

    Args:
        processes: World size.
        batch: Images per process.
        params: Number of trained parameters.
        side: Side of a view in pixels.
        dim: Width of a key.
    """
    others = (processes - 1) / processes
    rows = batch * others  # rows that another process owns after a shuffle
    return {
        "gradients": 2 * others * params * FLOAT,  # ring reduce-scatter and all-gather
        "shuffled images": rows * 3 * side * side,  # bytes, not floats
        "keys back": rows * dim * FLOAT,
        "keys for the queue": (processes - 1) * batch * dim * FLOAT,
        "loss and flags": 2 * others * VOTE,
    }


def official_shuffle(processes: int, batch: int, side: int) -> float:
    """Bytes that one process sends in an all-gather of all images as float32."""
    return (processes - 1) * batch * 3 * side * side * FLOAT


def recipe_of(words: argparse.Namespace, batch: int) -> Recipe:
    """MoCo v2 on the bundled images."""
    return build_recipe(
        {
            "method": {"name": "moco_v2", "queue_size": 1024, "bn_groups": batch // words.batch},
            "backbone": {"name": words.backbone},
            "data": {"path": "builtin:fashion_mnist", "split": "test", "workers": 0},
            "views": {"size": words.side},
            "train": {"batch_size": batch},
        }
    )


def sent_by_loopback() -> int:
    """Bytes sent on this network namespace's loopback device so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])


def work(words: argparse.Namespace) -> None:
    """Run one process of a measurement. The first process prints the result."""
    torch.set_num_threads(1)
    recipe = recipe_of(words, words.batch * int(os.environ.get("WORLD_SIZE", "1")))
    accelerator = make_accelerator(recipe)
    training = set_up_training(recipe, open_source(recipe.data), accelerator)
    method = training.method.train()
    steps = steps_to_measure(training)
    batches, timer = iter(make_train_loader(training, WARM_UP + STEPS)), StageTimer(CPU)
    for _ in range(WARM_UP):
        step(training, next(batches), steps, timer)
    accelerator.wait_for_everyone()
    before, started = sent_by_loopback(), time.perf_counter()
    for _ in range(STEPS):
        step(training, next(batches), steps, timer)
    accelerator.wait_for_everyone()
    seconds = time.perf_counter() - started
    found = {
        "sent": (sent_by_loopback() - before) / STEPS / world_size(),
        "images_per_second": STEPS * recipe.train.batch_size / seconds,
        "params": sum(param.numel() for param in method.parameters() if param.requires_grad),
    }
    if accelerator.is_main_process:
        print(json.dumps(found))
    accelerator.end_training()


def launch(words: argparse.Namespace, processes: int) -> dict[str, Any]:
    """Run one measurement in a separate network namespace."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    own = [__file__, "--work", "--backbone", words.backbone, "--side", str(words.side), "--batch", str(words.batch)]
    inner = [sys.executable, *(launcher if processes > 1 else []), *own]
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *inner]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))


def scaling(words: argparse.Namespace) -> tuple[float, float]:
    """Speed of two independent parallel runs relative to twice one, and of two processes relative to those."""
    one = launch(words, 1)["images_per_second"]
    with ThreadPoolExecutor() as pool:
        apart = sum(found["images_per_second"] for found in pool.map(launch, (words, words), (1, 1)))
    return apart / one / 2, launch(words, 2)["images_per_second"] / apart


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="store_true")
    parser.add_argument("--counts", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    words = parser.parse_args()
    if words.work:
        work(words)
        return
    print(machine("torch"))
    rows, last = [], {}
    for processes in words.counts:
        last = launch(words, processes)
        model = sent_per_step(processes, words.batch, last["params"], words.side)
        total = sum(model.values())
        rows.append([str(processes), f"{last['sent']:.4g}", f"{total:.4g}", f"{last['sent'] / total:.3f}"])
    print(table(["processes", "bytes sent per process and step", "by the formula", "ratio"], rows))
    print("\nThe formula for ResNet-50, 224 px, 32 images per process (MB sent per process and step)\n")
    rows = []
    for processes in (2, 8, 64, 512):
        model = sent_per_step(processes, 32, 27_900_000, 224)
        gathered = official_shuffle(processes, 32, 224)
        rows.append([str(processes), *(f"{value / 1e6:.3g}" for value in (*model.values(), gathered))])
    print(table(["processes", *model, "images with all-gather instead"], rows))
    if not words.rounds:
        return
    names = ("two single runs over twice one", "two processes over two single runs")
    shares = [scaling(words) for _ in range(words.rounds)]
    rows = []
    for name, values in zip(names, zip(*shares, strict=True), strict=True):
        rows.append([name, f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"])
    print()
    print(table(["images per second, one thread each", "median", "spread"], rows))


if __name__ == "__main__":
    main()
