"""What a method's step costs beyond the passes it cannot do without.

The limit is the bare backbone: forward and backward of the student and forward of the teacher's copy, on the same
batch. Both are timed in turn, and the ratios of neighbours are summarised, so that a noisy machine cancels out.

    python benchmarks/training_step.py --backbone resnet18 --size 64 --batch 64
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch

import sslkit
from sslkit.engine.draws import shuffle_order
from sslkit.engine.optim import make_optimizer
from sslkit.engine.run import build_method
from sslkit.methods import METHODS, Progress
from sslkit.recipe import Recipe, build_recipe

NUM_SAMPLES = 10_000  # rows of a memory bank


def recipe_of(method: str, backbone: str, size: int, batch: int) -> Recipe:
    """The paper's recipe at this size; BN in one group, so that both sides make the same calls."""
    options = {"bn_groups": 1} if "bn_groups" in METHODS[method].Options.model_fields else {}
    return build_recipe(
        {
            "method": {"name": method, **options},
            "backbone": {"name": backbone},
            "data": {"path": "builtin:fashion_mnist"},
            "views": {"size": size, "small_crops": 0},
            "train": {"batch_size": batch},
        }
    )


def whole_step(recipe: Recipe, views: list[torch.Tensor]) -> Callable[[], None]:
    """One training step as the engine makes it, without data."""
    torch.manual_seed(0)
    method = build_method(recipe, NUM_SAMPLES).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(recipe, method)
    ids = torch.arange(len(views[0]))

    def step() -> None:
        permutation = shuffle_order(recipe, 0) if method.shuffle_keys else None
        method(views, ids, permutation).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_update(Progress(1, 10))

    return step


def bare_passes(recipe: Recipe, views: list[torch.Tensor]) -> Callable[[], None]:
    """Forward and backward of the backbone on the student's views, and forward of a copy on the teacher's."""
    torch.manual_seed(0)
    method = build_method(recipe, NUM_SAMPLES).to(memory_format=torch.channels_last)
    student = method.backbone
    teacher = copy.deepcopy(student)
    student_views = len(method.student([view[:2] for view in views]))

    def step() -> None:
        sum(student(view).sum() for view in views[:student_views]).backward()
        with torch.no_grad():
            for index in method.teacher_views:
                teacher(views[index])

    return step


def seconds(step: Callable[[], None]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def main() -> None:
    """Print the median ratio and its spread for every method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    print(f"sslkit {sslkit.__version__}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), CPU")
    for name in METHODS:
        recipe = recipe_of(name, arguments.backbone, arguments.size, arguments.batch)
        views = [
            torch.randn(arguments.batch, 3, arguments.size, arguments.size).to(memory_format=torch.channels_last)
            for _ in range(2)
        ]
        whole, bare = whole_step(recipe, views), bare_passes(recipe, views)
        pairs = [(seconds(whole), seconds(bare)) for _ in range(arguments.repeats + 2)][2:]
        ratios = sorted(a / b for a, b in pairs)
        print(
            f"{name}: {statistics.median(ratios):.2f} x the bare passes (min {ratios[0]:.2f}, max {ratios[-1]:.2f}); "
            f"{arguments.batch / statistics.median(a for a, _ in pairs):.0f} images/s"
        )


if __name__ == "__main__":
    main()
