"""Runs broken on purpose, trained until it shows: the alarm rings, and is silent in the same run mended."""

from pathlib import Path
from typing import Any

import pytest
from conftest import small_recipe

import sslkit
from sslkit.files.jsonl_reader import read_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def kinds(folder: Path, model: str, lr: float, method: dict[str, Any]) -> set[str]:
    recipe = small_recipe(
        "moco_v2",
        model,
        method={"dim": 64, "queue_size": 4096, "temperature": 0.1, "momentum": 0.99, **method},
        data={"path": "builtin:fashion_mnist", "split": "train"},
        views={
            "policy": "small_gray",
            "size": 28,
            "crop_scale": [0.8, 1.0],
            "flip_prob": 0.0,
            "mean": [0.286] * 3,
            "std": [0.353] * 3,
        },
        optim={"name": "adamw", "lr": lr, "lr_rule": "none", "weight_decay": 0.01},
        schedule={"decay": "cosine", "warmup_epochs": 1, "per": "step"},
        train={"epochs": 5, "max_steps": 0, "batch_size": 128, "log_every": 10},
        monitor={"every_epochs": 1, "data": "builtin:fashion_mnist", "max_train": 4000},
    )
    sslkit.train(recipe, folder)
    return {alarm.partition(":")[0] for row in read_lines(folder / "diagnostics.jsonl") for alarm in row["alarms"]}


def test_statistics_that_leak(tmp_path: Path) -> None:
    """Groups of four images tell a query which key is its own; shuffling takes that away."""
    assert "leak" in kinds(tmp_path / "leaking", "test_resnet", 1e-3, {"bn_groups": 32, "shuffle": False})
    assert "leak" not in kinds(tmp_path / "shuffled", "test_resnet", 1e-3, {"bn_groups": 32, "shuffle": True})


def test_a_teacher_without_momentum(tmp_path: Path) -> None:
    """The paper's first ablation (MoCo v1, section 4.1): a copy of the student as the teacher fails."""
    assert kinds(tmp_path / "copied", "test_mambaout", 3e-3, {"bn_groups": 1, "momentum": 0.0})
    assert not kinds(tmp_path / "sound", "test_mambaout", 3e-3, {"bn_groups": 1})


def test_a_symmetric_run_without_momentum_in_its_first_epoch(tmp_path: Path) -> None:
    """Neither std nor rank are small yet when the features have lost nine tenths of their directions."""
    for momentum, expected in (("0.0", {"collapse"}), ("0.99", set())):
        recipe = sslkit.load_recipe("quickstart", [f"method.momentum={momentum}", "train.max_steps=80"])
        sslkit.train(recipe, tmp_path / momentum)
        rows = read_lines(tmp_path / momentum / "diagnostics.jsonl")
        assert {alarm.partition(":")[0] for row in rows for alarm in row["alarms"]} == expected
