"""Diagnostics while training: there for every method, right, harmless, resumed without a line twice."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import small_recipe
from safetensors.torch import load_file
from torch import Tensor

import sslkit
from sslkit.data.augment.cpu import ViewPipeline, normalise
from sslkit.data.sources.image_source import open_source
from sslkit.engine.checkpoint.writer import Saver
from sslkit.engine.monitor.diagnostics import Diagnostics
from sslkit.engine.monitor.evaluations import RunMonitor
from sslkit.engine.setup import build_method
from sslkit.evaluate.label_free.collapse_metrics import LabelFreeMetrics, label_free_metrics
from sslkit.methods import METHODS
from sslkit.methods.moco_v1 import MoCoV1
from sslkit.recipe.resolve import Recipe

BASE = {"step", "epoch", "embedding_std", "effective_rank", "alpha_req", "alignment", "uniformity"}
HISTOGRAMS = {"positive_histogram", "negative_histogram", "histogram_edges"}


@pytest.fixture
def monitored(class_folders: Path) -> dict[str, Any]:
    """kNN on forty pictures."""
    return {"every_epochs": 1, "data": str(class_folders), "k": 3}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "diagnostics.jsonl").read_text().splitlines()]


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "optimizer.safetensors")


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.full
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_them_and_no_bit_changes(name: str, monitored: dict[str, Any], tmp_path: Path) -> None:
    """BatchNorm, dropped paths, queues, banks and draws of noise: all as without diagnostics."""
    model = "test_vit" if name == "moco_v3" else "test_resnet"
    for every in (1, 0):
        recipe = small_recipe(
            name,
            model,
            backbone={"args": {"drop_path_rate": 0.2}},
            train={"max_steps": 3},
            monitor={**monitored, "diagnose_every": every, "layer_gradients": True},
        )
        sslkit.train(recipe, tmp_path / str(every))
    assert_same_bits(weights(tmp_path / "1", 3), weights(tmp_path / "0", 3))
    assert not (tmp_path / "0" / "diagnostics.jsonl").exists()
    rows = lines(tmp_path / "1")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows[:2]:
        assert set(row) == BASE | HISTOGRAMS | {"alarms"}
    assert set(rows[2]) == BASE | HISTOGRAMS | {"alarms", "lidar"}
    assert sum(rows[0]["positive_histogram"]) == 32
    assert sum(rows[0]["negative_histogram"]) == 32 * 31
    assert len(rows[0]["histogram_edges"]) == len(rows[0]["positive_histogram"]) + 1


def test_the_numbers_are_those_of_the_batch_and_of_the_sample() -> None:
    recipe = small_recipe("instdisc", "test_resnet", train={"batch_size": 20, "micro_batch": 5})
    source = open_source(recipe.data).without_labels()
    torch.manual_seed(0)
    backbone = build_method(recipe, len(source)).backbone.train()
    backbone.bn1.eval()  # some part may be frozen: each keeps its own mode
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    watch = Diagnostics(recipe, source, Accelerator(cpu=True))
    pipeline = ViewPipeline(recipe.views, recipe.train.seed)
    order = np.random.default_rng(recipe.train.seed).permutation(len(source))[:20]

    def views(epoch: int) -> list[Tensor]:
        pairs = [pipeline(source.read(int(index)), epoch, int(index))[:2] for index in order]
        return [torch.from_numpy(np.stack(view)) for view in zip(*pairs, strict=True)]

    of_batch, of_sample = watch.of_batch(backbone, views(0)), watch.of_sample(backbone)
    assert not backbone.bn1.training
    assert backbone.training
    assert backbone.layer1.training
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    backbone.eval()
    with torch.no_grad():
        encoded = [
            backbone(normalise(view, recipe.views.mean, recipe.views.std))
            for epoch in range(4)
            for view in views(epoch)
        ]
    expected = label_free_metrics(torch.stack(encoded, dim=1))
    assert of_sample["lidar"] == pytest.approx(expected.lidar, rel=1e-3)
    for row in (of_batch, of_sample):
        assert row["effective_rank"] == pytest.approx(expected.effective_rank, rel=1e-3)
        assert row["alignment"] == pytest.approx(expected.alignment, rel=1e-3)


def test_a_resumed_run_has_the_lines_of_an_undisturbed_one(monitored: dict[str, Any], tmp_path: Path) -> None:
    def recipe(steps: int) -> Any:
        return small_recipe(
            "moco_v2",
            "test_resnet",
            data={"path": monitored["data"], "split": "train"},
            train={"max_steps": steps, "batch_size": 10},
            monitor={**monitored, "diagnose_every": 1},
            checkpoint={"every_steps": 2},
        )

    sslkit.train(recipe(0), tmp_path / "whole")
    sslkit.train(recipe(2), tmp_path / "parts")
    with (tmp_path / "parts" / "diagnostics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "epoch": 0.75, "alarms": []}\n{"step": 4, "ep')  # killed after its last checkpoint
    sslkit.train(recipe(0), tmp_path / "parts")
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    assert [row["step"] for row in parts] == [1, 2, 3, 4]
    # Stopping at step 2 measured kNN there, so that line is of the sample.
    assert [row for row in parts if row["step"] != 2] == [row for row in whole if row["step"] != 2]
    assert sslkit.train(recipe(0), tmp_path / "parts").step == 4
    assert lines(tmp_path / "parts") == parts


def test_a_run_from_before_diagnostics_and_shuffle_is_continued(tmp_path: Path) -> None:
    def recipe(steps: int) -> Recipe:
        return small_recipe("moco_v2", "test_resnet", train={"max_steps": steps})

    sslkit.train(recipe(2), tmp_path / "run")
    saved = tmp_path / "run" / "recipe.toml"
    later = ("diagnose_every", "shuffle")
    saved.write_text("".join(line for line in saved.read_text().splitlines(True) if not line.startswith(later)))
    (tmp_path / "run" / "diagnostics.jsonl").unlink()
    sslkit.train(recipe(4), tmp_path / "run")
    assert [row["step"] for row in lines(tmp_path / "run")] == [4]


def train_by_adamw(folder: Path, lr: float, momentum: float, steps: int = 20) -> list[dict[str, Any]]:
    recipe = small_recipe(
        "moco_v2",
        "test_mambaout",
        method={"momentum": momentum},
        optim={"name": "adamw", "lr": lr, "lr_rule": "none", "weight_decay": 0.01},
        train={"max_steps": steps, "batch_size": 64},
        monitor={"diagnose_every": 10},
    )
    sslkit.train(recipe, folder)
    return lines(folder)


@pytest.mark.full
def test_a_teacher_without_momentum_collapses_and_one_with_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = train_by_adamw(tmp_path / "sound", 0.03, 0.99)
    assert [(row["step"], row["alarms"]) for row in sound] == [(1, []), (10, []), (20, [])]
    assert "ALARM" not in capsys.readouterr().out
    broken = train_by_adamw(tmp_path / "broken", 0.03, 0.0)
    assert [len(row["alarms"]) for row in broken] == [1, 2, 2]
    assert broken[0]["alarms"][0].startswith("teacher: ")
    assert broken[-1]["alarms"][0].startswith("collapse: all images get almost the same features, whose std is ")
    said = capsys.readouterr().out
    assert said.count("ALARM at step 10: collapse: ") == 1
    assert said.count("ALARM") == 2  # the teacher is told too
    train_by_adamw(tmp_path / "broken", 0.03, 0.0, steps=30)
    assert len(lines(tmp_path / "broken")[-1]["alarms"]) >= 1
    assert "ALARM at step 30: collapse" not in capsys.readouterr().out


@pytest.mark.full
def test_a_rate_far_too_high_is_seen(tmp_path: Path) -> None:
    for lr, expected in ((1e-3, set()), (1.0, {"collapse"})):
        recipe = small_recipe(
            "moco_v3",
            "test_vit",
            backbone={"freeze_patch_embed": False},
            optim={"name": "adamw", "lr": lr, "lr_rule": "none", "weight_decay": 0.1},
            train={"max_steps": 50, "log_every": 10},
            monitor={"diagnose_every": 10, "layer_gradients": True},
        )
        sslkit.train(recipe, tmp_path / str(lr))
        alarms = [alarm for row in lines(tmp_path / str(lr)) for alarm in row["alarms"]]
        # Whether the gradient spikes as well depends on the machine's last digits.
        assert {alarm.partition(":")[0] for alarm in alarms} - {"spike"} == expected
        assert all("layer" in alarm for alarm in alarms if alarm.startswith("spike"))


def test_a_fall_of_knn_is_written_beside_it(
    monitored: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curves of a leak, played to a real run: kNN sinks while the pretext task is solved."""
    scores = iter([0.8, 0.5])
    monkeypatch.setattr("sslkit.engine.monitor.knn_monitor.KnnMonitor.__call__", lambda *_args: next(scores))
    monkeypatch.setattr("sslkit.engine.monitor.evaluations.RunMonitor._compare", lambda _self: {})
    pretext = iter(torch.linspace(0.1, 1.0, 8))
    contrast = MoCoV1.contrast
    monkeypatch.setattr(MoCoV1, "contrast", lambda *args: (contrast(*args)[0], next(pretext)))
    recipe = small_recipe(
        "moco_v2",
        "test_vit",
        optim={"name": "adamw", "lr": 1e-4, "weight_decay": 0.0},
        data={"path": monitored["data"], "split": "train"},
        train={"batch_size": 10, "max_steps": 0, "epochs": 2},
        monitor={**monitored, "data": "builtin:fashion_mnist"},
    )
    sslkit.train(recipe, tmp_path / "run")
    rows = {row["step"]: row["alarms"] for row in lines(tmp_path / "run")}
    assert rows[4] == []
    assert [alarm.partition(":")[0] for alarm in rows[8]] == ["dip", "leak"]
    assert "kNN is 50.0% at epoch 2, 30.0 points below its best of epoch 1" in rows[8][0]
    assert "from epoch 1 to 2 pretext accuracy rose by 51 points" in rows[8][1]


def test_features_that_are_no_numbers_are_an_alarm_and_no_crash() -> None:
    recipe = small_recipe("simclr", "test_vit")
    source = open_source(recipe.data).without_labels()
    backbone = build_method(recipe, len(source)).backbone
    with torch.no_grad():
        backbone.norm.weight.fill_(float("nan"))
    line = Diagnostics(recipe, source, Accelerator(cpu=True)).of_sample(backbone)
    assert line == {"alarms": ["collapse: features are not finite; try a lower [optim] lr"]}


class Slow:
    """Computes as `label_free_metrics` does, but for longer than a step takes."""

    def __init__(self) -> None:
        self.threads = set[str]()

    def __call__(self, features: torch.Tensor) -> LabelFreeMetrics:
        self.threads.add(threading.current_thread().name.split("_")[0])
        time.sleep(0.2)
        return label_free_metrics(features)


def in_background(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """As on a GPU."""
    make, slow = RunMonitor.__init__, Slow()

    def background(self: RunMonitor, *arguments: Any) -> None:
        make(self, *arguments)
        self.in_background = True

    monkeypatch.setattr(RunMonitor, "__init__", background)
    monkeypatch.setattr("sslkit.engine.monitor.diagnostics.label_free_metrics", slow)
    return slow


def watched_recipe(**train: Any) -> Recipe:
    return small_recipe(
        "moco_v2",
        "test_resnet",
        train={"max_steps": 6, **train},
        checkpoint={"every_steps": 3},
        monitor={"diagnose_every": 2},
    )


def test_lines_are_the_same_when_they_are_computed_while_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sslkit.train(watched_recipe(), tmp_path / "in place")
    slow = in_background(monkeypatch)
    written = {}
    save = Saver.save

    def note(self: Saver, step: int, *arguments: Any) -> None:
        save(self, step, *arguments)
        written[step] = [row["step"] for row in lines(tmp_path / "run")]

    monkeypatch.setattr(Saver, "save", note)
    sslkit.train(watched_recipe(), tmp_path / "run")
    assert slow.threads == {"diagnostics"}
    assert lines(tmp_path / "run") == lines(tmp_path / "in place")
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2, 4, 6]
    assert written == {3: [1, 2], 6: [1, 2, 4, 6]}  # a checkpoint has all lines before it beside it


def test_lines_in_the_background_survive_an_exception_and_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sslkit.train(watched_recipe(), tmp_path / "in place")
    in_background(monkeypatch)
    observe = RunMonitor.observe

    def die(self: RunMonitor, result: Any) -> None:
        if result.step + 1 == 5:
            raise KeyError("a fault in step 5")
        observe(self, result)

    with monkeypatch.context() as patched:
        patched.setattr(RunMonitor, "observe", die)
        with pytest.raises(KeyError, match="step 5"):
            sslkit.train(watched_recipe(), tmp_path / "run")
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2, 4]
    sslkit.train(watched_recipe(), tmp_path / "run")  # from step 3
    assert lines(tmp_path / "run") == lines(tmp_path / "in place")


def test_a_fault_in_the_background_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_background(monkeypatch)

    def fail(_features: torch.Tensor) -> None:
        raise ZeroDivisionError("in the numbers")

    monkeypatch.setattr("sslkit.engine.monitor.diagnostics.label_free_metrics", fail)
    with pytest.raises(ZeroDivisionError, match="in the numbers"):
        sslkit.train(watched_recipe(), tmp_path / "run")
