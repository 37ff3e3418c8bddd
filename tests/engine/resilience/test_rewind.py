"""Going back after bad steps: to points that depend on the steps alone, whatever a signal or the clock saved too."""

import contextlib
import io
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_recipe
from launching import tensors

import sslkit
from sslkit.data.order.sampler import GlobalBatchSampler
from sslkit.engine import setup as run_module
from sslkit.engine import trainer
from sslkit.engine.checkpoint.retention import saved_steps
from sslkit.engine.resilience.guard import BadStepError
from sslkit.engine.resilience.rewind import is_rewind_point
from sslkit.engine.state import RecoveryState
from sslkit.methods import BatchInfo, Progress, Step
from sslkit.recipe.resolve import Recipe

IMAGES, LAST = 2000, 10
At = tuple[int, int]  # how often the run has gone back, and a step from 0


def samples(recipe: Recipe, at: At) -> tuple[int, ...]:
    """The images of a step's batch."""
    variant, step = at
    train = recipe.train
    batches = GlobalBatchSampler(
        IMAGES, train.batch_size, train.seed, start_step=step, total_steps=step + 1, order_variant=variant
    )
    return tuple(sample for _, sample in next(iter(batches)))


def make_trouble(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, bad: set[int], stops: set[At]) -> None:
    """Make the loss of some batches NaN, and send SIGTERM in the middle of others, once each."""
    bad_batches = {samples(recipe, (0, step)) for step in bad}
    stop_batches = {samples(recipe, at) for at in stops}
    build = run_module.build_method

    def troubled(*arguments: Any) -> Any:
        method = build(*arguments)
        objective = method.objective

        def with_trouble(features: Any, keys: Any, info: BatchInfo, progress: Progress) -> Step:
            step: Step = objective(features, keys, info, progress)
            batch = tuple(info.sample_ids.tolist())
            if batch in bad_batches:
                step.loss = step.loss * math.nan
            if batch in stop_batches:
                stop_batches.discard(batch)
                os.kill(os.getpid(), signal.SIGTERM)
            return step

        method.objective = with_trouble
        return method

    monkeypatch.setattr(run_module, "build_method", troubled)


def recipe_with(optimizer: str = "adamw", rewind_lr: float = 0.5, **checkpoint: Any) -> Recipe:
    return small_recipe(
        "moco_v2",
        "test_resnet",
        train={"max_steps": LAST},
        optim={"name": optimizer, "lr": 1e-2, "lr_rule": "none", "weight_decay": 1e-4},
        checkpoint={"every_minutes": 0.0, **checkpoint},
        guard={"policy": "skip", "max_skips": 1, "max_rewinds": 2, "rewind_lr": rewind_lr},
    )


@dataclass
class Ended:
    """A run that is done: its tensors, its lines of metrics without times, how often it was started, what it said."""

    tensors: dict[str, torch.Tensor]
    rows: list[dict[str, Any]]
    starts: int
    said: str


def trained(folder: Path, recipe: Recipe, bad: set[int], stops: set[At]) -> Ended:
    """Start a run until it is done."""
    starts, printed = 1, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        make_trouble(patch, recipe, bad, stops)
        while sslkit.train(recipe, folder).stopped:
            starts += 1
    rows = [
        {key: value for key, value in row.items() if key not in ("images_per_second", "data_wait")}
        for row in sslkit.Run(folder, LAST).metrics()
    ]
    return Ended(tensors(folder, LAST), rows, starts, printed.getvalue())


# What is saved, which steps are bad at first, where SIGTERM comes, and how far the run goes back.
CASES: dict[str, tuple[dict[str, Any], set[int], set[At], int]] = {
    "the stop is no point to go back to": ({"every_steps": 4}, {6, 7}, {(0, 5)}, 4),
    "among the bad steps, one checkpoint kept": ({"every_steps": 4, "keep": 1}, {6, 7}, {(0, 5), (0, 6)}, 4),
    "on a point, among the bad steps": ({"every_steps": 4, "keep": 1}, {7, 8}, {(0, 7)}, 4),
    "before and after": ({"every_steps": 4, "keep": 1}, {6, 7}, {(0, 1), (0, 4), (1, 6)}, 4),
    "the clock saves too": ({"every_steps": 4, "every_minutes": 1e-9, "keep": 1}, {6, 7}, {(0, 5)}, 4),
    "only the clock saves": ({"every_minutes": 1e-9, "keep": 1}, {6, 7}, {(0, 5), (1, 2)}, 0),
    "nothing saved yet": ({}, {6, 7}, {(0, 5)}, 0),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, set[int]], Ended]:
    """The same run without signals, without saves by the clock, and with every checkpoint kept."""
    folder, ended = tmp_path_factory.mktemp("undisturbed"), dict[str, Ended]()

    def of(every_steps: int, bad: set[int]) -> Ended:
        name = f"{every_steps} {sorted(bad)}"
        if name not in ended:
            ended[name] = trained(folder / name, recipe_with(every_steps=every_steps, keep=9), bad, set())
        return ended[name]

    return of


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_goes_back_as_an_undisturbed_one(
    case: str, tmp_path: Path, undisturbed: Callable[[int, set[int]], Ended]
) -> None:
    saves, bad, stops, back = CASES[case]
    recipe = recipe_with(**saves)
    whole, other = undisturbed(saves.get("every_steps", 0), bad), trained(tmp_path / "run", recipe, bad, stops)
    assert [ended.said.count(f"back to step {back},") for ended in (whole, other)] == [1, 1]
    assert (whole.starts, other.starts) == (1, 1 + len(stops))
    assert whole.tensors.keys() == other.tensors.keys()
    assert [name for name, value in whole.tensors.items() if not torch.equal(value, other.tensors[name])] == []
    assert whole.rows == other.rows
    assert [row["step"] for row in other.rows] == list(range(1, LAST + 1))
    # A checkpoint that is kept for going back stays no longer than it is needed.
    assert len(saved_steps(tmp_path / "run/checkpoints")) <= recipe.checkpoint.keep + 1


def test_points_are_few_where_the_recipe_names_none() -> None:
    """Every thousand steps, and not at what only the clock or the end of a run saves."""
    by_clock, epochs = recipe_with(every_minutes=15.0), recipe_with(keep_every_epochs=3)
    assert [step for step in range(1, 5000) if is_rewind_point(by_clock, 62, step)] == [1000, 2000, 3000, 4000]
    assert [step for step in range(1, 500) if is_rewind_point(epochs, 62, step)] == [186, 372]


@pytest.mark.full
@pytest.mark.parametrize("optimizer", ["sgd", "lamb"])
def test_the_start_is_the_start(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going back to the start gives what a run gives that takes the other order of images from the start."""
    recipe = recipe_with(optimizer, rewind_lr=1.0)
    gone_back = trained(tmp_path / "run", recipe, {3, 4}, set())
    assert "back to step 0," in gone_back.said
    monkeypatch.setattr(trainer, "recovery_state_of", lambda *_arguments: RecoveryState(rewinds=1))
    fresh = trained(tmp_path / "fresh", recipe, set(), set())
    assert [name for name, value in fresh.tensors.items() if not torch.equal(value, gone_back.tensors[name])] == []


def test_what_began_elsewhere_has_no_start_to_go_back_to(tmp_path: Path) -> None:
    """A run that took up another folder's checkpoint does not begin with fresh weights; stopped or not."""
    first = recipe_with(every_steps=4, keep=3)
    trained(tmp_path / "first", first, set(), set())
    source = str(tmp_path / "first/checkpoints/step-00000004")
    for name, stops in (("whole", set[At]()), ("stopped", {(0, 5)})):
        with pytest.MonkeyPatch.context() as patch:
            make_trouble(patch, first, {6, 7}, stops)
            if stops:
                assert sslkit.train(first, tmp_path / name, source).stopped
            with pytest.raises(BadStepError, match="no checkpoint yet to go back"):
                sslkit.train(first, tmp_path / name, "auto" if stops else source)


def test_a_run_that_stopped_at_bad_steps_can_be_continued_by_skipping_them(tmp_path: Path) -> None:
    """Checkpoints of the policy "stop" are all points to go back to, wherever they lie."""
    stop = recipe_with().as_tables()
    stop["guard"]["policy"], stop["checkpoint"]["every_steps"] = "stop", 3
    with pytest.raises(BadStepError, match="step 7: the loss is nan"):
        trained(tmp_path / "run", sslkit.recipe.resolve.build_recipe(stop), {7, 8}, set())
    ended = trained(tmp_path / "run", recipe_with(every_steps=5), {7, 8}, set())
    assert "back to step 6," in ended.said
