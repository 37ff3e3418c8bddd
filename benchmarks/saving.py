"""Cost of a checkpoint to the training that continues during the save.

    python benchmarks/saving.py [--backbone vit_small_patch16_224] [--rounds 3]

MoCo v3 with AdamW trains on one batch repeatedly. Rounds alternate between steps without a save and as many steps with
a save at their start. The difference is the cost of the save: the copy into host memory, and the cores and memory that
the writer thread uses. The table compares it with the default interval of 15 minutes.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from side_by_side import machine, table

from sslkit.engine.checkpoint.writer import Saver
from sslkit.engine.optim import make_optimizer
from sslkit.engine.setup import build_method
from sslkit.methods import BatchInfo, Progress
from sslkit.recipe.resolve import Recipe, build_recipe

INTERVAL = 900.0  # seconds: [checkpoint] every_minutes = 15


def recipe_of(backbone: str, size: int) -> Recipe:
    """MoCo v3 with the paper's settings."""
    tables = {
        "method": {"name": "moco_v3"},
        "backbone": {"name": backbone},
        "data": {"path": "builtin:fashion_mnist"},
        "views": {"size": size},
        "train": {"batch_size": 4},
        "checkpoint": {"keep": 1},
    }
    return build_recipe(tables)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="Seconds per round.")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    recipe = recipe_of(arguments.backbone, arguments.size)
    method = build_method(recipe)
    optimizer = make_optimizer(recipe, method)
    views = [torch.randn(4, 3, arguments.size, arguments.size) for _ in range(2)]

    def step() -> None:
        method(views, BatchInfo(torch.arange(4)), Progress(0, 1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_update(Progress(1, 10))

    def seconds_of(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            step()
        return time.perf_counter() - started

    seconds_of(2)
    count = max(round(arguments.seconds / seconds_of(2) * 2), 4)
    stalls, copies, writes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), recipe, 100, 0, print)
        with saver:
            for number in range(arguments.rounds):
                without = seconds_of(count)
                started = time.perf_counter()
                saver.save(number + 1, method, optimizer, {"course": {}, "recipe": recipe.as_tables(), "scaler": {}})
                copies.append(time.perf_counter() - started)
                with_save = copies[-1] + seconds_of(count)
                stalls.append(with_save - without)
                saver.wait()
                writes.append(time.perf_counter() - started)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) / 2**20
    print(machine("torch", "timm"))
    rows = [
        ["checkpoint and encoder on disk", f"{size:.0f} MiB"],
        ["copy into host memory, training stands still", f"{median(copies):.2f} s"],
        ["writing in the background, at the most", f"{median(writes):.1f} s"],
        ["training lost by a save, all in all", f"{median(stalls):.2f} s ({min(stalls):.2f} to {max(stalls):.2f})"],
        ["of 15 minutes", f"{median(stalls) / INTERVAL:.2%}"],
    ]
    print(table([f"{arguments.backbone}, MoCo v3, AdamW", "measured"], rows))


if __name__ == "__main__":
    main()
