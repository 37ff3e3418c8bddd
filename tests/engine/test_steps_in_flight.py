"""A loop that reads a step's numbers two steps late does what one does that reads them at once.

GPUs are read late. Here a CPU is made to behave like one: PyTorch's fused optimizers heed ``found_inf`` on CPUs too.
"""

import json
import math
import random
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_recipe
from launching import tensors
from safetensors.torch import load_file

import sslkit
from sslkit.engine import setup, trainer
from sslkit.engine.replay import replay_step
from sslkit.engine.resilience.guard import BadStepError, DeviceVerdicts, Guard
from sslkit.engine.state import LOSS_WINDOW, RecoveryState
from sslkit.methods import METHODS, BatchInfo, Progress
from sslkit.methods.base import Step
from sslkit.parts.updates.update_gate import gated
from sslkit.recipe.resolve import Recipe
from sslkit.recipe.schema import GuardConfig

SPEED = ("images_per_second", "data_wait")
SGD = {"name": "sgd", "lr": 0.05, "lr_rule": "none", "weight_decay": 1e-4}


def run_with(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    name: str,
    lag: int,
    bad: frozenset[int] = frozenset(),
    factor: float = math.nan,
    **tables: Any,
) -> Any:
    """Train for 7 steps, of which those in ``bad`` (from 0) have a loss that is not a number."""
    build = setup.build_method

    def broken(*arguments: Any) -> Any:
        method = build(*arguments)
        objective = method.objective

        def poisoned(student: Any, teacher: Any, batch: BatchInfo, progress: Progress) -> Step:
            step: Step = objective(student, teacher, batch, progress)
            step.loss = step.loss * (factor if progress.updates in bad else 1.0)
            return step

        def after_update(progress: Progress) -> dict[str, float]:
            with gated(torch.ones(())):
                return after(progress)

        after, method.objective = method.after_update, poisoned
        if not lag:  # a teacher that moves under a gate differs from one that does not by rounding
            method.after_update = after_update
        return method

    tables = {"train": {"max_steps": 7}, "optim": SGD, **tables}
    with monkeypatch.context() as patch:
        patch.setattr(setup, "build_method", broken)
        patch.setattr(setup, "lag_of", lambda *_: lag)
        model = "test_vit" if name == "moco_v3" else "test_resnet"
        return sslkit.train(small_recipe(name, model, **tables), folder)


def assert_equal_runs(one: Path, other: Path, step: int = 7) -> None:
    first, second = tensors(one, step), tensors(other, step)
    assert first.keys() == second.keys()
    differing = [key for key in first if not torch.equal(first[key], second[key])]
    assert not differing


@pytest.mark.parametrize(
    "name", [name if name in ("simclr", "moco_v2") else pytest.param(name, marks=pytest.mark.full) for name in METHODS]
)
def test_a_late_loop_skips_what_an_immediate_one_skips(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 2, 3 and 6 are bad: one in the middle, two in a row, and the last."""
    runs = [
        run_with(
            monkeypatch,
            tmp_path / str(lag),
            name,
            lag,
            frozenset({2, 3, 6}),
            guard={"policy": "skip", "loss_spike": 3.0},
        )
        for lag in (0, 2)
    ]
    assert_equal_runs(tmp_path / "0", tmp_path / "2")
    rows = [[{k: v for k, v in row.items() if k not in SPEED} for row in run.metrics()] for run in runs]
    assert [row["step"] for row in rows[1]] == [row["step"] for row in rows[0]] == list(range(1, 8))
    assert [row["step"] for row in rows[1] if "skipped" in row] == [3, 4, 7]
    assert rows[0] == rows[1]


def test_a_late_loop_is_exact_when_it_is_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with(monkeypatch, tmp_path / "whole", "moco_v2", 2)
    run_with(monkeypatch, tmp_path / "parts", "moco_v2", 2, train={"max_steps": 4})
    run_with(monkeypatch, tmp_path / "parts", "moco_v2", 2)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_late_loop_that_stops_has_the_weights_before_the_bad_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumps = []
    for lag in (0, 2):
        with pytest.raises(BadStepError, match=r"step 3: the loss is nan; stopped before the weights were updated"):
            run_with(monkeypatch, tmp_path / str(lag), "simclr", lag, frozenset({3}))
        [dump] = (tmp_path / str(lag) / "capsules").iterdir()
        dumps.append(torch_tensors(dump))
        assert replay_step(dump).step == 3
    statistics = ("running_mean", "running_var", "num_batches_tracked")  # a run that stops does not restore them
    for key in dumps[0]:
        assert key.endswith(statistics) or torch.equal(dumps[0][key], dumps[1][key]), key


def torch_tensors(dump: Path) -> dict[str, torch.Tensor]:
    return load_file(dump / "model.safetensors")


def test_a_late_loop_goes_back_after_too_many_bad_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {
        "guard": {"policy": "skip", "max_skips": 1, "max_rewinds": 1},
        "checkpoint": {"every_steps": 2, "keep": 9},
    }
    for lag in (0, 2):
        with pytest.raises(BadStepError, match=r"step 5: the loss is nan; consecutive bad steps: 2.*rewound 1 time"):
            run_with(monkeypatch, tmp_path / str(lag), "simclr", lag, frozenset({4, 5}), **tables)
    assert_equal_runs(tmp_path / "0", tmp_path / "2", step=4)


def scaled(make: Callable[[Recipe], Any], recipe: Recipe) -> Any:
    """An accelerator with the gradient scaler of fp16, which Accelerate has on GPUs only."""
    accelerator = make(recipe)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(accelerator._optimizers[-1].optimizer)
    return accelerator


def test_an_overflow_under_a_scaler_is_skipped_late_as_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 3 overflows: nothing is updated, the scale halves, and the logged norm is that of the unscaled gradient."""
    monkeypatch.setattr(trainer, "make_accelerator", partial(scaled, trainer.make_accelerator))
    runs = [
        run_with(monkeypatch, tmp_path / str(lag), "simclr", lag, frozenset({3}), factor=1e37, guard={"policy": "skip"})
        for lag in (0, 2)
    ]
    assert_equal_runs(tmp_path / "0", tmp_path / "2")
    rows = [run.metrics() for run in runs]
    assert [row["step"] for row in rows[1] if "skipped" in row] == [4]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    saved = [json.loads((tmp_path / f"{lag}/checkpoints/step-00000007/state.json").read_text()) for lag in (0, 2)]
    assert saved[1]["scaler"] == saved[0]["scaler"]
    assert saved[1]["scaler"]["scale"] == 2048.0  # doubled after three steps, halved, doubled after three more

    monkeypatch.undo()
    plain = run_with(monkeypatch, tmp_path / "plain", "simclr", 0)
    norms = [[row["grad_norm"] for row in rows[1][:3]], [row["grad_norm"] for row in plain.metrics()[:3]]]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_device_and_host_decide_alike() -> None:
    """Of random losses, some of which are spikes or not finite; a refused one ends what the device allows."""
    draw = random.Random(3)
    config = GuardConfig(policy="skip", loss_spike=2.5)
    allowed = refused = 0
    for _ in range(20):
        recovery = RecoveryState(losses=deque([1.0] * draw.choice([0, 10, 19, 20, 49, 50]), LOSS_WINDOW))
        guard = Guard(config, recovery, torch.nn.Module())
        verdicts = DeviceVerdicts(2.5, recovery.losses, torch.device("cpu"))
        for _ in range(60):
            loss = torch.tensor(
                draw.choice([draw.uniform(0.5, 1.5)] * 12 + [draw.uniform(1.5, 4.0), math.inf, math.nan])
            )
            norm = torch.tensor(draw.choice([1.0] * 30 + [math.inf]))
            problem = guard.problem(loss.item(), norm.item())
            assert bool(verdicts.allow(loss, norm)) == (not problem), (problem, len(recovery.losses))
            if problem:
                refused += 1
                assert not verdicts.allow(torch.tensor(1.0), torch.tensor(1.0))
                verdicts = DeviceVerdicts(2.5, recovery.losses, torch.device("cpu"))
            else:
                allowed += 1
                guard.accept(loss.item())
    assert allowed > 200
    assert refused > 50
