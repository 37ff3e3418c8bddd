"""A run that is killed and continued ends as one that was not: same bits, no line of metrics twice or missing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import small_recipe
from launching import finish, pretrain, start, write_recipe
from safetensors.torch import load_file
from torch import Tensor

import sslkit
from sslkit.engine.checkpoint.format import newest_checkpoint
from sslkit.errors import UserError
from sslkit.methods import METHODS
from sslkit.recipe.resolve import Recipe


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "optimizer.safetensors")


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def recipe_of(name: str, steps: int, optimizer: str) -> Recipe:
    model = "test_vit" if name == "moco_v3" else "test_resnet"
    return small_recipe(
        name,
        model,
        backbone={"name": model, "args": {"drop_path_rate": 0.2}},
        train={"max_steps": steps, "batch_size": 500},
        optim={"name": optimizer, "lr": 0.01, "weight_decay": 0.01},
        checkpoint={"every_steps": 2, "keep": 9},
    )


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "optimizer"), [(name, "sgd") for name in METHODS] + [("moco_v3", "lamb"), ("moco_v3", "adamw")]
)
def test_stopping_anywhere_changes_no_bit(name: str, optimizer: str, tmp_path: Path) -> None:
    """Four steps an epoch; stops mid-epoch and at its end, two resumes in a row."""
    undisturbed = sslkit.train(recipe_of(name, 0, optimizer), tmp_path / "whole")
    assert undisturbed.step == 4
    for steps in (1, 3, 0):
        run = sslkit.train(recipe_of(name, steps, optimizer), tmp_path / "parts")
    assert_same_bits(weights(tmp_path / "whole", 4), weights(tmp_path / "parts", 4))
    losses = [[row["step"] for row in r.metrics()] for r in (undisturbed, run)]
    assert losses == [[1, 2, 3, 4]] * 2
    assert [r["loss"] for r in run.metrics()] == [r["loss"] for r in undisturbed.metrics()]


@pytest.mark.full
def test_killed_in_mid_flight(tmp_path: Path) -> None:
    """SIGKILL from outside at an arbitrary moment, then the same command again."""
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text(
        small_recipe(
            "moco_v2",
            "test_resnet",
            train={"max_steps": 60},
            checkpoint={"every_steps": 7},
            data={"workers": 1},
        ).to_toml()
    )
    command = [sys.executable, "-m", "sslkit.pretrain", str(recipe_file), "--output"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL, start_new_session=True)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 24) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "checkpoints" / "step-00000060").exists()
    again = subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, text=True)
    assert "continuing" in again.stdout
    assert_same_bits(weights(tmp_path / "whole", 60), weights(tmp_path / "killed", 60))
    lines = [sslkit.Run(tmp_path / name, 60).metrics() for name in ("whole", "killed")]
    assert [row["loss"] for row in lines[0]] == [row["loss"] for row in lines[1]]
    third = subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, text=True)
    assert "nothing to do" in third.stdout


@pytest.mark.full
def test_another_number_of_processes_sees_the_same_batches(tmp_path: Path) -> None:
    """One process, then two, then one again, against one all the way: the same samples, losses but for rounding."""
    words = {"checkpoint": {"every_steps": 2}, "guard": {"compare_every": 1}}
    for steps, processes, folder in ((2, 1, "mixed"), (4, 2, "mixed"), (6, 1, "mixed"), (6, 1, "whole")):
        recipe = write_recipe(tmp_path, "moco_v3", "test_vit", train={"max_steps": steps}, **words)
        process = start(pretrain(recipe, tmp_path / folder), processes=processes)
        said = finish(process)
        assert process.returncode == 0, said
    mixed, whole = (sslkit.Run(tmp_path / folder, 6).metrics() for folder in ("mixed", "whole"))
    assert [row["step"] for row in mixed] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(mixed, whole, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    ours, theirs = (weights(tmp_path / folder, 6) for folder in ("mixed", "whole"))
    for name, tensor in theirs.items():
        if name.startswith("backbone.") and name.endswith("weight"):  # AdamW magnifies the noise of small gradients
            assert (ours[name] - tensor).norm() <= 2e-3 * tensor.norm(), name


def test_torn_checkpoints_are_passed_over_by_name(tmp_path: Path) -> None:
    recipe = small_recipe(train={"max_steps": 4}, checkpoint={"every_steps": 2, "keep": 2})
    sslkit.train(recipe, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(each.name for each in folder.glob("step-*")) == ["step-00000002", "step-00000004"]
    assert (folder / "latest").read_text().strip() == "step-00000004"
    model = folder / "step-00000004" / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    checkpoint, complaints = newest_checkpoint(folder)
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert str(model) in complaints[0]
    (folder / "step-00000002" / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no intact checkpoint left"):
        newest_checkpoint(folder)


def test_another_recipe_in_the_same_folder_is_refused_with_the_changes(tmp_path: Path) -> None:
    sslkit.train(small_recipe(train={"max_steps": 1}), tmp_path / "run")
    with pytest.raises(UserError, match=r"train\.seed: 0 -> 5"):
        sslkit.train(small_recipe(train={"max_steps": 1, "seed": 5}), tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run"):
        sslkit.train(small_recipe(train={"max_steps": 1}), tmp_path / "run", resume="never")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run"):
        sslkit.train(small_recipe(train={"max_steps": 1}), tmp_path / "other")


def test_starting_from_another_runs_checkpoint(tmp_path: Path) -> None:
    sslkit.train(small_recipe(train={"max_steps": 2}), tmp_path / "first")
    run = sslkit.train(small_recipe(train={"max_steps": 4}), tmp_path / "second", resume=str(tmp_path / "first"))
    assert [row["step"] for row in run.metrics()] == [3, 4]
    with pytest.raises(UserError, match="--resume"):
        sslkit.train(small_recipe(), tmp_path / "third", resume=str(tmp_path / "nowhere"))
    assert not (tmp_path / "third").exists()


def test_a_broken_or_abandoned_later_checkpoint_does_not_outlive_the_good_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sslkit.train(small_recipe(train={"max_steps": 6}, checkpoint={"every_steps": 2, "keep": 9}), run)
    folder = run / "checkpoints"
    (folder / "step-00000006" / "model.safetensors").write_bytes(b"torn")
    sslkit.train(small_recipe(train={"max_steps": 5}, checkpoint={"every_steps": 1, "keep": 1}), run)
    assert [each.name for each in folder.glob("step-*")] == ["step-00000005"]
    checkpoint, complaints = newest_checkpoint(folder)
    assert checkpoint is not None
    assert checkpoint.step == 5
    assert complaints == []


def test_a_checkpoint_of_another_recipe_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    sslkit.train(small_recipe(train={"max_steps": 2}), tmp_path / "first")
    for tables in ({"optim": {"name": "sgd", "lr": 0.1, "weight_decay": 0.0}}, {"method": {"dim": 8}}):
        method = {"name": "moco_v3", "hidden_dim": 32, **tables.pop("method", {})}
        with pytest.raises(UserError, match="was trained by another recipe"):
            sslkit.train(
                small_recipe(train={"max_steps": 4}, method=method, **tables),
                tmp_path / "second",
                resume=str(tmp_path / "first"),
            )
        assert not (tmp_path / "second").exists()


def test_precision_may_change_between_runs_of_one_process(tmp_path: Path) -> None:
    for precision in ("bf16", "no"):
        recipe = small_recipe("moco_v2", "test_resnet", train={"max_steps": 2, "precision": precision})
        run = sslkit.train(recipe, tmp_path / precision)
        assert [row["step"] for row in run.metrics()] == [1, 2]
