"""The verdict at the end of a run, against the evaluation of the finished run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run, small_recipe
from PIL import Image

import sslkit
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.engine.monitor import baseline_scores
from sslkit.publish.export import export_encoder


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty garments, each class in a colour of its own."""
    root = tmp_path_factory.mktemp("coloured")
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="test"))
    labels = source.labels()[:60]
    colours = dict(zip(sorted(set(labels)), np.random.default_rng(0).uniform(0.2, 1.0, (10, 3)), strict=True))
    for index, label in enumerate(labels):
        folder = root / label.replace("/", "-")
        folder.mkdir(exist_ok=True)
        Image.fromarray((source.read(index) * colours[label]).astype(np.uint8)).save(folder / f"{index:03d}.png")
    return root


@pytest.fixture(scope="module")
def monitor(coloured: Path) -> dict[str, Any]:
    return {"every_epochs": 1, "data": str(coloured), "k": 3}


@pytest.fixture(scope="module")
def trained(monitor: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "first"
    sslkit.train(small_recipe("moco_v2", "test_resnet", monitor=monitor, train={"max_steps": 2}), folder)
    return folder


def test_the_run_says_what_the_evaluation_says(
    trained: Path, coloured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [row] = sslkit.Run(trained, 2).results()
    words = ["eval", "knn", str(trained), "--data", str(coloured), "--k", "3", "--no-cache"]
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    judged = json.loads(out)
    assert judged["protocol_hash"] == row["protocol_hash"]
    names = ["random init", "raw pixels", "colour histograms"]
    assert [score["encoder"] for score in row["scores"]] == ["this run", *names]
    assert [score["encoder"] for score in judged["scores"]] == [str(trained), *names]
    for mine, theirs in zip(row["scores"], judged["scores"], strict=True):
        assert (mine["accuracy"], mine["difference"]) == (theirs["accuracy"], theirs["difference"])
    assert row["verdict"] == judged["verdict"]
    assert row["verdict"].startswith("On 12 test images, the encoder does not beat ")
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert out.rstrip().endswith(row["verdict"])
    assert sslkit.Run(trained, 2).results()[-1]["verdict"] == row["verdict"]  # stored with the score


def test_only_the_last_knn_is_compared_and_the_message_is_its_sentence(
    monitor: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables: dict[str, Any] = {"train": {"max_steps": 0, "epochs": 2, "batch_size": 30}, "monitor": monitor}
    tables["data"] = {"path": monitor["data"], "split": "train"}
    sslkit.train(small_recipe("moco_v3", "test_vit", **tables), tmp_path / "run")
    first, *others, last = sslkit.Run(tmp_path / "run", 4).results()
    assert "verdict" not in first
    assert not others
    printed = capsys.readouterr().out
    assert printed.count("the encoder") == 1
    assert last["verdict"] in printed
    assert "kNN on the same images: random init " in printed


def test_a_run_from_pretrained_weights_is_compared_with_its_start(
    trained: Path, coloured: Path, monitor: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_encoder(trained, tmp_path / "public")
    start = f"the start (local-dir:{tmp_path / 'public'})"
    recipe = small_recipe(
        "moco_v2",
        "test_resnet",
        backbone={"pretrained": f"local-dir:{tmp_path / 'public'}"},
        optim={"lr": 0.0},
        monitor=monitor,
        train={"max_steps": 1},
    )
    sslkit.train(recipe, tmp_path / "run")
    scores = {score["encoder"]: score["accuracy"] for score in sslkit.Run(tmp_path / "run", 1).results()[-1]["scores"]}
    first = sslkit.Run(trained, 2).results()[0]
    assert list(scores) == ["this run", "random init", start, "raw pixels", "colour histograms"]
    assert scores[start] == first["accuracy"]
    capsys.readouterr()
    words = ["eval", "knn", str(tmp_path / "run"), "--data", str(coloured), "--k", "3", "--no-cache"]
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    assert {each["encoder"]: each["accuracy"] for each in json.loads(out)["scores"]}[start] == scores[start]
    (tmp_path / "public" / "config.json").unlink()
    code, out, err = run(capsys, *words, "--json")
    assert code == 0
    assert "is not compared with its start: " in err
    assert start not in out


def test_baselines_that_cannot_be_measured_end_no_run(
    monitor: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(baseline_scores, "MAX_IMAGES", 20)
    sslkit.train(small_recipe("moco_v2", "test_resnet", monitor=monitor, train={"max_steps": 1}), tmp_path / "run")
    [row] = sslkit.Run(tmp_path / "run", 1).results()
    assert "accuracy" in row
    assert "verdict" not in row
    printed = capsys.readouterr().out
    assert "kNN of the baselines cannot be measured: 60 images are more than 20; set [monitor] max_train" in printed
