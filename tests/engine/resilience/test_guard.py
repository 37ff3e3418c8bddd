"""Bad numbers never reach the weights: stop, skip, or go back; and the capsule computes them again."""

import json
import math
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_recipe
from launching import finish, saboteur, start, tensors, write_recipe

import sslkit
from sslkit.cli import main
from sslkit.data.order.epoch_order import epoch_order
from sslkit.engine import setup as run_module
from sslkit.engine import trainer
from sslkit.engine.checkpoint.format import Checkpoint, newest_checkpoint
from sslkit.engine.replay import replay_step
from sslkit.engine.resilience.guard import BadStepError, Guard, RewindError
from sslkit.engine.state import RecoveryState
from sslkit.errors import UserError
from sslkit.files.jsonl_reader import read_lines
from sslkit.methods import METHODS
from sslkit.methods.base import Step
from sslkit.parts.batchnorm import GlobalBatchNorm
from sslkit.recipe.schema import GuardConfig


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int], factor: float) -> dict[str, Any]:
    """Multiply the loss of some calls of the objective; keeps the method and its state before each of them."""
    seen: dict[str, Any] = {"calls": 0, "before": {}}
    build = run_module.build_method

    def broken(*arguments: Any) -> Any:
        seen["method"] = method = build(*arguments)
        objective = method.objective

        def objective_with_poison(*args: Any) -> Step:
            seen["calls"] += 1
            step: Step = objective(*args)
            if seen["calls"] in calls:
                step.loss = step.loss * factor
            return step

        method.objective = objective_with_poison
        return method

    monkeypatch.setattr(run_module, "build_method", broken)
    return seen


def state(run: Path) -> dict[str, torch.Tensor]:
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return checkpoint.model


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_skipped_step_leaves_no_trace(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipping the last step leaves weights, teacher, queue and running statistics as they were without it."""
    options = {"optim": {"name": "sgd", "lr": 0.05, "weight_decay": 1e-4}, "guard": {"policy": "skip"}}
    model = "test_vit" if name == "moco_v3" else "test_resnet"
    sslkit.train(small_recipe(name, model, **options, train={"max_steps": 3}), tmp_path / "short")
    poison(monkeypatch, {4}, math.nan)
    run = sslkit.train(small_recipe(name, model, **options, train={"max_steps": 4}), tmp_path / "run")
    one, other = state(tmp_path / "short"), state(tmp_path / "run")
    if name == "swav":  # brings its prototypes to unit length at the start of a step, a good one's or a bad one's
        one["prototypes.weight"] = torch.nn.functional.normalize(one["prototypes.weight"])
    assert all(torch.equal(one[key], other[key]) for key in one)
    rows = run.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert (rows[3]["loss"], rows[3]["skipped"]) == (None, 1.0)


def test_a_spike_is_skipped_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {25}, 100.0)
    recipe = small_recipe(train={"max_steps": 30}, guard={"policy": "skip", "loss_spike": 5.0})
    run = sslkit.train(recipe, tmp_path / "run")
    assert [row["step"] for row in run.metrics() if "skipped" in row] == [25]
    assert run.step == 30


def test_too_many_in_a_row_go_back_and_take_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 5, 6 and 7 are bad; two may be skipped; back to the checkpoint of step 4 at half the rate."""
    poison(monkeypatch, {5, 6, 7}, math.nan)
    tables = {
        "train": {"max_steps": 10},
        "checkpoint": {"every_steps": 2, "keep": 9},
        "optim": {"name": "sgd", "lr": 0.05, "lr_rule": "none", "weight_decay": 0.0},
        "schedule": {"decay": "constant", "per": "step"},
        "guard": {"policy": "skip", "max_skips": 2, "rewind_lr": 0.5},
    }
    run = sslkit.train(small_recipe(**tables), tmp_path / "run")
    assert "back to step 4" in capsys.readouterr().out
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["lr"] for row in rows] == [0.05] * 4 + [0.025] * 6
    assert not any("skipped" in row for row in rows)
    # A run that is stopped after it went back must go on in the new order.
    monkeypatch.undo()
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for step in (8, 10):
        shutil.rmtree(tmp_path / f"again/checkpoints/step-{step:08d}")
    again = sslkit.train(small_recipe(**tables), tmp_path / "again")
    assert [row["loss"] for row in again.metrics()] == [row["loss"] for row in rows]
    first, second = tensors(tmp_path / "run", 10), tensors(tmp_path / "again", 10)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.full
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_going_back_forgets_what_the_optimizer_learned_since(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backbone rests for four steps: the checkpoint of step 3 has no moments of it, and step 5 is bad."""
    seen = []

    def restore(checkpoint: Checkpoint, method: torch.nn.Module, given: torch.optim.Optimizer, scaler: Any) -> None:
        whole(checkpoint, method, given, scaler)
        moments = [given.state[param] for param in method.backbone.parameters() if param in given.state]
        seen.append([float(value.abs().max()) for slots in moments for value in slots.values()])

    whole = trainer.restore
    monkeypatch.setattr(trainer, "restore", restore)
    poison(monkeypatch, {6}, math.nan)
    tables = {
        "train": {"batch_size": 500, "epochs": 3, "max_steps": 8, "head_warmup_epochs": 1},
        "optim": {"name": optimizer, "lr": 1e-3, "lr_rule": "none", "weight_decay": 0.0},
        "checkpoint": {"every_steps": 3, "keep": 9},
        "guard": {"policy": "skip", "max_skips": 0},
    }
    sslkit.train(small_recipe("byol", "test_resnet", **tables), tmp_path / "run")
    [moments] = seen
    assert not any(moments)


def test_orders_after_going_back_differ_and_stay_permutations() -> None:
    orders = [epoch_order(3, 5, 1000, detour) for detour in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert (orders[0] == epoch_order(3, 5, 1000)).all()


def test_what_stays_bad_stops_the_run_with_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, set(range(5, 100)), math.nan)
    recipe = small_recipe(
        train={"max_steps": 30}, checkpoint={"every_steps": 2}, guard={"policy": "skip", "max_skips": 2}
    )
    with pytest.raises(BadStepError, match=r"step 6: the loss is nan.*rewound 1 time before"):
        sslkit.train(recipe, tmp_path / "run")
    assert all(torch.isfinite(tensor).all() for tensor in state(tmp_path / "run").values())
    assert len(list((tmp_path / "run/capsules").iterdir())) == 1


def test_a_spike_is_told_by_the_median_of_good_steps() -> None:
    course = RecoveryState(losses=deque([1.0, 2.0, 3.0] * 10, maxlen=50))
    guard = Guard(GuardConfig(loss_spike=4.0), course, torch.nn.Module())
    assert guard.problem(7.9, 1.0) == ""
    assert "over 4 times 2, the median of the last 30" in guard.problem(8.1, 1.0)
    assert guard.problem(1.0, math.inf) == "the gradient norm is inf"
    assert guard.problem(1.0, None) == ""
    few = Guard(GuardConfig(loss_spike=4.0), RecoveryState(losses=deque([1.0] * 19, maxlen=50)), torch.nn.Module())
    assert few.problem(1e9, 1.0) == ""
    restored = RecoveryState(**json.loads(json.dumps(course.model_dump(mode="json"))))
    assert restored == course
    assert restored.losses.maxlen == 50


@pytest.mark.full
def test_one_process_has_a_bad_loss_and_all_skip_it(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"max_steps": 6}, guard={"policy": "skip", "compare_every": 1})
    process = start(saboteur("nan", 3, 1, recipe, tmp_path / "run"), processes=2)
    said = finish(process)
    assert process.returncode == 0, said
    rows = read_lines(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows if "skipped" in row] == [3]
    assert rows[-1]["step"] == 6


def bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that makes the third block's output infinite, from the fourth step on."""
    after_update = METHODS["moco_v3"].after_update
    updates: list[int] = []

    def spoil(self: Any, progress: Any) -> dict[str, float]:
        updates.append(progress.updates)
        moved: dict[str, float] = after_update(self, progress)
        if len(updates) == 3:
            with torch.no_grad():
                self.backbone.blocks[2].mlp.fc1.weight.fill_(torch.inf)
        return moved

    monkeypatch.setattr(METHODS["moco_v3"], "after_update", spoil)


def test_a_capsule_computes_the_step_again_and_names_the_culprit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_input(monkeypatch)
    with pytest.raises(BadStepError, match=r"step 3: the loss is nan.*sslkit replay .*capsules/step-00000003"):
        sslkit.train(small_recipe("moco_v3", "test_vit"), tmp_path / "run")
    monkeypatch.undo()
    found = replay_step(tmp_path / "run/capsules/step-00000003")
    assert found.same
    assert found.culprit == "backbone.blocks.2.mlp.fc1"
    assert found.bad_gradients
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(tmp_path / "run/capsules/step-00000003")])
    assert ended.value.code == 0
    assert "first output that is not finite: backbone.blocks.2.mlp.fc1" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_spike_is_computed_again_to_the_last_bit(name: str, tmp_path: Path) -> None:
    """A factor so low that the first step that may be called a spike is one; with drop path, queue and teacher."""
    model = "test_vit" if name == "moco_v3" else "test_resnet"
    recipe = small_recipe(
        name,
        model,
        backbone={"name": model, "args": {"drop_path_rate": 0.2}},
        train={"max_steps": 30},
        guard={"loss_spike": 0.01},
    )
    with pytest.raises(BadStepError, match="the loss is"):
        sslkit.train(recipe, tmp_path / "run")
    (capsule,) = (tmp_path / "run/capsules").iterdir()
    found = replay_step(capsule)
    assert found.then["loss"] > 0
    if name == "swav":  # its prototypes are brought to unit length once more
        assert found.now == pytest.approx(found.then, rel=1e-5)
    else:
        assert found.same, (found.then, found.now)
    assert (found.culprit, found.bad_gradients) == ("", [])


def test_capsules_that_cannot_be_replayed_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {2}, math.nan)
    with pytest.raises(BadStepError):
        sslkit.train(small_recipe(), tmp_path / "run")
    monkeypatch.undo()
    capsule = tmp_path / "run/capsules/step-00000001"
    with pytest.raises(UserError, match="not a crash dump"):
        replay_step(tmp_path)
    facts = json.loads((capsule / "capsule.json").read_text())
    for change, words in (({"images": 7}, "made with 7 images"), ({"step": "x"}, "not a crash dump")):
        (capsule / "capsule.json").write_text(json.dumps(facts | change))
        with pytest.raises(UserError, match=words):
            replay_step(capsule)
    (capsule / "capsule.json").write_text(json.dumps(facts))
    with (capsule / "model.safetensors").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(UserError, match="damaged or changed"):
        replay_step(capsule)


def test_bad_steps_in_a_row_are_counted_without_an_ordinal() -> None:
    guard = Guard(GuardConfig(policy="skip", max_skips=0), RecoveryState(), torch.nn.Module())
    with pytest.raises(RewindError, match=r"step 3: the loss is nan; consecutive bad steps: 1$"):
        guard.refuse(3, "the loss is nan", "")


def test_a_refused_step_leaves_no_trace_in_synchronised_running_statistics() -> None:
    """Several processes on CPUs have `GlobalBatchNorm` in place of PyTorch's layer."""
    layer = GlobalBatchNorm(torch.nn.BatchNorm1d(3))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    guard = Guard(GuardConfig(policy="skip"), RecoveryState(), layer)
    guard.snapshot(0)
    layer(torch.randn(4, 3))
    assert not torch.equal(layer.running_mean, before["running_mean"])
    guard.restore(0)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
