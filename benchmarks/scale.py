"""What a run on 1 to 512 GPUs sends, keeps in memory and writes, counted without any.

    python benchmarks/scale.py [--recipes mocov2_r50 mocov3_vitb simclr_r50] [--gpus 1 8 64 512] [--batch 32]

Collectives of a step are counted on fake CUDA tensors in a fake group of that many processes; DDP's all-reduce of the
gradients is added. The host's part is measured with names and orders of so many images on this machine.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
from fake_cuda import count_step
from pyarrow import parquet
from side_by_side import machine, table

from sslkit.data.order.epoch_order import Shuffle
from sslkit.engine.setup import build_method
from sslkit.recipe.resolve import Recipe, load_recipe

MILLION = 1_000_000
DIM = 128


def recipe_of(name: str, batch: int) -> Recipe:
    """A shipped recipe with a global batch."""
    return load_recipe(name, ["data.path=builtin:fashion_mnist", f"train.batch_size={batch}"])


def step_row(name: str, gpus: int, batch: int) -> list[str]:
    """What a process does in a step."""
    recipe = recipe_of(name, batch * gpus)
    counts = count_step(recipe, gpus)
    method = build_method(recipe, 1)
    trained = 4 * sum(param.numel() for param in method.parameters() if param.requires_grad)
    gradients = 2 * (gpus - 1) / gpus * trained
    calls = sum(counts.collectives.values())
    return [name, str(gpus), str(batch * gpus), str(counts.syncs), str(calls), *megabytes(gradients, counts.sent)]


def megabytes(*sizes: float) -> list[str]:
    """Sizes in MB."""
    return [f"{size / 1e6:.3g}" for size in sizes]


def state_row(name: str) -> list[str]:
    """The size of a checkpoint, and of what every GPU has a copy of."""
    method = build_method(recipe_of(name, 256), MILLION)
    trained = sum(param.numel() for param in method.parameters() if param.requires_grad)
    moments = 2 if "vitb" in name else 1
    model = sum(tensor.numel() * tensor.element_size() for tensor in method.state_dict().values())
    kept = [bank.keys if hasattr(bank, "keys") else bank.rows for bank in method.dictionaries().values()]
    queue = sum(tensor.numel() * 4 for tensor in kept)
    return [name, *megabytes(model, 4 * moments * trained, queue)]


def host_row(images: int) -> list[str]:
    """Names in a table, and the order of an epoch, for so many images."""
    few = min(images, 2 * MILLION)
    names = pa.array([f"train/n{number % 1000:08d}/n{number % 1000:08d}_{number:08d}.JPEG" for number in range(few)])
    with TemporaryDirectory() as folder:
        written = Path(folder) / "names.parquet"
        parquet.write_table(pa.table({"name": names}), written, compression="zstd")
        stored = written.stat().st_size
    order, seconds = timed(lambda: Shuffle(images).epoch(0, 0, 0, 256))
    held = order.samples.nbytes + order.repeats.nbytes
    scale = images / few
    bank = images * DIM * 4
    sizes = megabytes(scale * names.nbytes, scale * stored, held)
    return [f"{images / MILLION:g} M", *sizes, f"{seconds:.2g}", *megabytes(bank)]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and its seconds."""
    started = time.perf_counter()
    found = work()
    return found, time.perf_counter() - started


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=["mocov2_r50", "mocov3_vitb", "simclr_r50"])
    parser.add_argument("--gpus", type=int, nargs="*", default=[1, 8, 64, 512])
    parser.add_argument("--batch", type=int, default=32, help="images of each GPU")
    parser.add_argument("--images", type=float, nargs="*", default=[1.281167e6, 1e8])
    words = parser.parse_args()
    print(machine("torch"))
    head = [
        "recipe",
        "GPUs",
        "global batch",
        "waits",
        "collectives beside DDP's",
        "MB sent for gradients",
        "MB sent else",
    ]
    print(table(head, [step_row(name, gpus, words.batch) for name in words.recipes for gpus in words.gpus]), end="\n\n")
    head = ["recipe", "MB of the model in a checkpoint", "MB of the optimizer's state", "MB of queue on every GPU"]
    print(table(head, [state_row(name) for name in words.recipes]), end="\n\n")
    head = ["images", "MB of names in memory", "MB of names in the run folder", "MB of an epoch's order per process"]
    head += ["seconds to draw it", "MB of a memory bank on every GPU"]
    print(table(head, [host_row(int(images)) for images in words.images]))


if __name__ == "__main__":
    main()
