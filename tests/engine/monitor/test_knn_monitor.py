"""What is watched while training."""

import errno
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import small_recipe
from torch import nn

import sslkit
from sslkit.engine.monitor import knn_monitor as monitors
from sslkit.engine.monitor.knn_monitor import make_knn_monitor
from sslkit.engine.step import layer_gradients
from sslkit.errors import UserError
from sslkit.files import jsonl_writer as lines


def test_layers_are_named_in_order_and_their_norms_add_up() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"stem": nn.Linear(4, 4), "blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    net["blocks"][1].requires_grad_(False)
    x = net["blocks"][1](net["blocks"][0](net["stem"](torch.randn(3, 4))))
    x.square().sum().backward()
    found = layer_gradients(net)
    assert list(found) == ["gradient/stem", "gradient/blocks.0"]
    total = torch.nn.utils.get_total_norm([param.grad for param in net.parameters() if param.grad is not None])
    assert sum(norm**2 for norm in found.values()) == pytest.approx(total.item() ** 2, rel=1e-5)


def test_parameters_of_no_layer_come_last() -> None:
    """The first name is the first layer: a ViT's patch projection, not its class token."""
    net = timm.create_model("test_vit", num_classes=0, img_size=32)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    found = list(layer_gradients(net))
    assert found[:2] == ["gradient/patch_embed", "gradient/blocks.0"]
    assert set(found[-2:]) == {"gradient/cls_token", "gradient/pos_embed"}


def test_a_run_logs_them_only_if_asked(tmp_path: Path) -> None:
    for asked in (True, False):
        recipe = small_recipe("moco_v3", "test_vit", monitor={"layer_gradients": asked}, train={"max_steps": 2})
        run = sslkit.train(recipe, tmp_path / str(asked))
        layers = [key for key in run.metrics()[0] if key.startswith("gradient/")]
        assert ("gradient/blocks.0" in layers) == asked
        assert "gradient/patch_embed" not in layers  # frozen


def test_more_neighbours_than_the_bank_has_are_refused_before_anything_is_written(
    class_folders: Path, tmp_path: Path
) -> None:
    """Forty images, of which a fifth is held out; the advice works."""
    monitor: dict[str, Any] = {"every_epochs": 1, "data": str(class_folders)}
    for k, max_train, most in ((33, 0, 32), (20, 10, 10)):
        with pytest.raises(UserError, match=rf"\[monitor\] k: {k} .* the {most} images .* set k = {most} or less"):
            sslkit.train(small_recipe(monitor={**monitor, "k": k, "max_train": max_train}), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    recipe = small_recipe(monitor={**monitor, "k": most, "max_train": max_train}, train={"max_steps": 1})
    assert sslkit.train(recipe, tmp_path / "run").results()[0]["protocol"]["k"] == most


def test_features_that_are_not_numbers_have_no_score_and_end_no_run(class_folders: Path) -> None:
    recipe = small_recipe(monitor={"every_epochs": 1, "data": str(class_folders), "k": 3})
    monitor = make_knn_monitor(recipe, torch.device("cpu"), 0)
    assert monitor is not None
    backbone = timm.create_model("test_resnet", num_classes=0)
    assert isinstance(monitor(backbone), float)
    backbone.conv1[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="the features are not finite"):
        monitor(backbone)


def vanish(monkeypatch: pytest.MonkeyPatch, folder: Path, stays: int) -> None:
    """All images of the monitor but some of each split go once the run has begun."""
    measure = monitors.KnnMonitor.features

    def after_that(self: Any, backbone: nn.Module, source: Any) -> Any:
        for split in ("train", "test"):
            for file in sorted((folder / split).rglob("*.png"))[stays:]:
                file.unlink()
        return measure(self, backbone, source)

    monkeypatch.setattr(monitors.KnnMonitor, "features", after_that)


def not_a_number(monkeypatch: pytest.MonkeyPatch, _folder: Path) -> None:
    extract = monitors.extract_features
    monkeypatch.setattr(monitors, "extract_features", lambda *args, **options: extract(*args, **options) * math.nan)


def one_class(monkeypatch: pytest.MonkeyPatch, _folder: Path) -> None:
    make = monitors.KnnMonitor

    def alike(*arguments: Any) -> Any:
        monitor = make(*arguments)
        monitor.pair.train_labels.zero_()
        monitor.pair.test_labels.zero_()
        return monitor

    monkeypatch.setattr(monitors, "KnnMonitor", alike)


def full_disk(monkeypatch: pytest.MonkeyPatch, _folder: Path) -> None:
    append = lines.append_text

    def refuse(file: Path, text: str) -> None:
        if file.name == "results.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        append(file, text)

    monkeypatch.setattr(lines, "append_text", refuse)


@pytest.mark.parametrize(
    ("trouble", "words", "scores"),
    [
        (partial(vanish, stays=0), "cannot be measured: [monitor] data: 40 images of", 0),
        (partial(vanish, stays=2), "cannot be measured: [monitor] data: 36 images of", 0),
        (not_a_number, "cannot be measured: the features are not finite", 0),
        (one_class, "kNN 100.00%", 1),
        (full_disk, "No space left on device; 1 line will be written later", 0),
    ],
    ids=["no image can be read", "fewer than k can", "features are no numbers", "one class", "full disk"],
)
def test_a_knn_that_cannot_be_measured_ends_no_run(
    trouble: Any,
    words: str,
    scores: int,
    class_folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run goes on to its end, with a sentence."""
    for number, file in enumerate(sorted(class_folders.rglob("*.png"))):
        target = tmp_path / "images" / ("train" if number % 2 else "test") / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    trouble(monkeypatch, tmp_path / "images")
    recipe = small_recipe(
        "moco_v2",
        "test_resnet",
        train={"max_steps": 2},
        monitor={"every_epochs": 1, "data": str(tmp_path / "images"), "k": 3, "diagnose_every": 1},
    )
    run = sslkit.train(recipe, tmp_path / "run")
    assert run.step == 2
    said = capsys.readouterr().out
    assert words in said
    assert len(run.results()) == scores
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir()
