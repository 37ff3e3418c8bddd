"""What a step asks of a GPU, counted on fake CUDA tensors: nothing waits, and launches stay near the bare passes'.

A mix of devices or dtypes, or a call that needs a driver, raises an error.
"""

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import small_recipe

from sslkit.methods import METHODS
from sslkit.recipe.resolve import Recipe

PROCESSES, SLICES, DEVICES, PRECISIONS = (1, 8), (0, 8), ("cpu", "accelerator"), ("no", "bf16", "fp16")
CHOSEN = [(1, 0, "accelerator", "bf16"), (8, 0, "cpu", "fp16")]
SLICED = (1, 8, "cpu", "no")
# What optimizer, teacher, queue, verdict and the downloads of numbers may launch beside the passes: a few operators on
# lists of tensors each.
LOOP = 130
BATCH = 64


@pytest.fixture(scope="module")
def fake() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        yield importlib.import_module("fake_cuda")


def recipe_of(name: str, slices: int, device: str, precision: str, **method: Any) -> Recipe:
    model = "test_vit" if name == "moco_v3" else "test_resnet"
    grouped = {"bn_groups": 8} if name in ("moco_v1", "moco_v2", "end_to_end") else {}
    train = {"batch_size": BATCH, "micro_batch": slices, "precision": precision}
    return small_recipe(name, model, method={**grouped, **method}, train=train, views={"device": device})


def every_case() -> list[Any]:
    def is_chosen(name: str, *settings: Any) -> bool:
        return settings in CHOSEN or (name == "moco_v2" and settings == SLICED)

    cases = itertools.product(METHODS, PROCESSES, SLICES, DEVICES, PRECISIONS)
    possible = [case for case in cases if case[1] * case[2] <= BATCH]
    return [pytest.param(*case, marks=() if is_chosen(*case) else pytest.mark.full) for case in possible]


@pytest.mark.parametrize(("name", "processes", "slices", "device", "precision"), every_case())
def test_a_step_waits_for_nothing(
    fake: Any, name: str, processes: int, slices: int, device: str, precision: str
) -> None:
    counts = fake.count_step(recipe_of(name, slices, device, precision), processes)
    assert not counts.waits
    if processes == 1:
        assert not counts.collectives


@pytest.mark.parametrize(
    "name", [name if name in ("moco_v2", "swav") else pytest.param(name, marks=pytest.mark.full) for name in METHODS]
)
def test_launches_stay_near_those_of_the_bare_passes(fake: Any, name: str) -> None:
    """Whole, without views of the device's own, in bf16, with as many BN groups as the papers have GPUs."""
    recipe = recipe_of(name, 0, "cpu", "bf16")
    step, bare = fake.count_step(recipe), fake.count_passes(recipe)
    assert bare.launches > 100
    assert step.launches <= 1.5 * bare.launches + LOOP


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "optimizer"), [("simclr", "lars_simclr"), ("moco_v3", "lars"), ("byol", "lars"), ("swav", "larc")]
)
def test_optimizers_by_layer_launch_few_operators(fake: Any, name: str, optimizer: str) -> None:
    plain = {"name": "sgd", "lr": 0.1, "weight_decay": 1e-6}
    counts = [
        fake.count_step(
            small_recipe(name, "resnet50", train={"batch_size": 64}, optim={**plain, "name": each})
        ).launches
        for each in ("sgd", optimizer)
    ]
    assert 0 < counts[1] - counts[0] <= 40
