"""Plans of real images: what is measured, printed and trained."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from conftest import cli_error, run
from PIL import Image

from sslkit.cli.options import RecipeOptions
from sslkit.engine.run_folder.layout import Run
from sslkit.errors import UserError
from sslkit.methods import METHODS
from sslkit.plan import make_plan as planning
from sslkit.plan.make_plan import make_plan
from sslkit.recipe.resolve import Recipe

SMALL = ["--backbone", "test_resnet", "--set", "data.workers=0"]


@pytest.fixture(autouse=True)
def _short_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MEASURED_SECONDS", 0.2)


def stated(data: Path | str, **tables: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"data": {"path": str(data), "workers": 0}, "backbone": {"name": "test_resnet"}, **tables}


def test_epochs_fill_the_time(monkeypatch: pytest.MonkeyPatch, class_folders: Path) -> None:
    monkeypatch.setattr(planning, "profile", lambda *_args, **_kwargs: SimpleNamespace(step=0.5))
    plan = make_plan(stated(class_folders), hours=0.1)  # 40 images are 1 step of 32: 324 s for 0.5 s an epoch
    assert plan.recipe.train.batch_size == 32
    assert plan.recipe.train.epochs == 400  # the most: 200 s, with a tenth for evaluations
    assert plan.seconds == pytest.approx(400 * 0.5 / 0.9)
    text = "\n".join(plan.lines())
    assert "images: 40, grey, about 28 x 28 pixels, 10 classes" in text
    assert "stated: backbone.name, data.path, data.workers" in text
    assert "in 3m42s" in text
    assert "note: 40 images are few to learn from alone" in text


def test_a_plan_without_measurement_says_so(class_folders: Path) -> None:
    plan = make_plan(stated(class_folders), hours=None)
    assert plan.recipe.train.epochs == 100
    assert not any("expected end" in line for line in plan.lines())


# What is stated of a plan for images with labels, and keys of the plan that must or must not be there.
STATED: list[tuple[dict[str, dict[str, Any]], dict[str, Any], set[str]]] = [
    ({"schedule": {"warmup_epochs": 10}}, {"schedule.warmup_epochs": 10.0, "train.epochs": 100}, set()),
    ({"monitor": {"every_epochs": 5}}, {"monitor.every_epochs": 5}, set()),
    ({"checkpoint": {"keep_best": "knn"}}, {"monitor.every_epochs": 10}, set()),
    ({"method": {"momentum": 0.9}}, {"method.momentum_half_life": None}, {"method.momentum_half_life"}),
    ({"optim": {"name": "adamw"}}, {"optim.lr": 1e-3, "optim.weight_decay": 0.01}, set()),
    ({"optim": {"name": "sgd"}}, {"optim.lr": 0.03, "optim.lr_rule": "linear"}, {"optim.lr", "optim.momentum"}),
    (
        {"optim": {"name": "sgd"}, "method": {"name": "byol"}},
        {"optim.lr": 0.03, "optim.weight_decay": 1e-4, "optim.momentum": 0.9},
        set(),
    ),
    ({"schedule": {"decay": "steps", "milestones": [60, 80]}}, {"schedule.milestones": [60.0, 80.0]}, set()),
    ({"views": {"blur_sigma": (0.1, 1.0)}}, {"views.blur_prob": 0.5}, {"views.blur_prob"}),
    ({"train": {"batch_size": 2}}, {"method.bn_groups": 1}, set()),
    ({"train": {"batch_size": 7}}, {"method.bn_groups": 1}, set()),
    ({"data": {"split": "train"}}, {"monitor.train_split": "train"}, set()),
]


@pytest.mark.parametrize("case", STATED, ids=lambda case: str(case[0]))
def test_what_is_stated_fits_the_rest(
    case: tuple[dict[str, dict[str, Any]], dict[str, Any], set[str]], tmp_path: Path
) -> None:
    given, expected, left_out = case
    for index in range(60):
        (tmp_path / f"class{index % 2}").mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"class{index % 2}" / f"{index}.png")
    tables = stated(tmp_path)
    plan = make_plan({**tables, **given, "data": {**tables["data"], **given.get("data", {})}}, hours=None)
    for key, value in expected.items():
        table, _, name = key.partition(".")
        assert getattr(getattr(plan.recipe, table), name) == value, key
    assert not left_out & {choice.key for choice in plan.choices}


def test_channels_are_measured_beside_images_that_cannot_be_read(tmp_path: Path) -> None:
    for index in range(20):
        pixels = np.full((5, 16, 16), 12345, dtype=np.uint16)  # every channel is constant
        tifffile.imwrite(tmp_path / f"{index}.tif", pixels, photometric="minisblack", planarconfig="separate")
    (tmp_path / "0.tif").write_bytes(b"no image")
    found = make_plan(stated(tmp_path, backbone={"name": "test_resnet", "args": {"in_chans": 5}}), hours=None)
    assert found.recipe.views.mean == pytest.approx((12345 / 65535,) * 5, abs=1e-4)
    assert found.recipe.views.std == (1e-3,) * 5


def test_the_batch_shrinks_until_memory_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def profile(recipe: Recipe, *_args: Any, **_kwargs: Any) -> SimpleNamespace:
        tried.append(recipe.train.batch_size)
        if recipe.train.batch_size > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return SimpleNamespace(step=1.0)

    monkeypatch.setattr(planning, "profile", profile)
    images = {"data": {"path": "builtin:fashion_mnist", "split": "test"}, "backbone": {"name": "test_resnet"}}
    plan = make_plan(images)
    assert tried == [64, 32, 16]
    assert plan.recipe.train.batch_size == 16
    with pytest.raises(UserError, match=r"a batch of 64 .* --set train.batch_size=32"):
        make_plan({**images, "train": {"batch_size": 64}})


def test_copies_are_counted(class_folders: Path, tmp_path: Path) -> None:
    shutil.copytree(class_folders, tmp_path / "images")
    first = next(iter(sorted((tmp_path / "images").rglob("*.png"))))
    for index in range(3):
        shutil.copy(first, first.with_name(f"copy{index}.png"))
    plan = make_plan(stated(tmp_path / "images"), hours=None)
    assert any(line.startswith("3 of 43 images looked at are copies of others") for line in plan.facts)
    assert [each.reason for each in plan.choices if each.key == "method.queue_size"] == [
        "one batch, the smallest queue there is"
    ]


def test_images_of_many_sizes(tmp_path: Path) -> None:
    for index in range(24):
        side = (8, 64, 300)[min(index % 4, 2)] if index % 8 else 64
        pixels = np.random.default_rng(index).integers(0, 256, (side, 2 * side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    plan = make_plan(stated(tmp_path), hours=None)
    assert "shorter side from 8 to 300" in plan.facts[0]
    assert any("(the median; from 8 to 300)" in each.reason for each in plan.choices if each.key == "views.size")


def test_the_run_folder_is_named_after_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos/2020").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "photos/2020")
    names = {"..": "photos", ".": "2020", "/": "images", "../2020/": "2020", "builtin:fashion_mnist": "fashion_mnist"}
    assert {path: RecipeOptions(data=path).name() for path in names} == names


def test_pretrain_with_data_alone_plans_trains_and_continues(
    capsys: pytest.CaptureFixture[str], class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["pretrain", "--data", str(class_folders), *SMALL]
    code, out, err = run(capsys, *words, "--hours", "0.01", "--set", "train.epochs=1")
    assert code == 0
    assert "measuring a step of moco_v2 on test_resnet" in err
    assert "method.symmetric = true" in out
    folder = Path("runs") / class_folders.name
    assert Run(folder, 1).metrics()[-1]["step"] == 1
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "already trained to step 1" in out
    assert "measuring" not in err


@pytest.mark.parametrize(
    "method", [name if name == "simclr" else pytest.param(name, marks=pytest.mark.full) for name in METHODS]
)
def test_every_method_starts_on_few_images(
    capsys: pytest.CaptureFixture[str], class_folders: Path, tmp_path: Path, method: str
) -> None:
    words = ["pretrain", "--method", method, "--data", str(class_folders), *SMALL, "--set", "train.max_steps=3"]
    code, out, err = run(capsys, *words, "--output", str(tmp_path / "run"), "--hours", "0.02")
    assert code == 0, err
    assert "done: " in out


@pytest.mark.full
def test_two_processes_make_one_plan(class_folders: Path, tmp_path: Path) -> None:
    words = ["--data", str(class_folders), *SMALL, "--set", "train.max_steps=2", "--hours", "0.02"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command = [*launcher, "sslkit.pretrain", *words, "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=os.environ.copy())
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("plan (--set") == 1
    assert "2 processes, cpu" in done.stdout


MISTAKES = [
    (["--data", "FEW"], "has 4 images; pretraining needs 16 or more"),
    (["--method", "moco_v2"], "give a recipe, such as quickstart, or --data with a folder of images"),
    (["--data", "FOLDER", "--method", "mocov22"], "did you mean 'moco_v2'?"),
    (["--data", "FOLDER", "--set", "optim.lr=fast"], "[optim] lr: must be a number"),
    (["--data", "FOLDER", "--set", "train.batch_size=64"], "batch_size: 64 is more than the 40 images"),
    (["--data", "nowhere"], "nowhere"),
    (["--data", "FOLDER", "--hours", "0"], "hours"),
    (["mocov2_r50", "--data", "FOLDER", "--hours", "2"], "leave --hours out"),
]


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: " ".join(case[0]))
def test_mistakes_are_one_sentence(
    case: tuple[list[str], str], class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few").mkdir()
    for file in sorted(class_folders.rglob("*.png"))[:4]:
        shutil.copy(file, tmp_path / "few" / file.name)
    folders = {"FEW": "few", "FOLDER": str(class_folders)}
    words, message = case
    assert message in cli_error(["pretrain", *(folders.get(word, word) for word in words)])
    assert not (tmp_path / "runs").exists()
