"""detectron2's checkpoint: its names from its own architecture, and a file that a wary reader can open."""

import importlib
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import small_recipe
from safetensors.torch import load_file

import sslkit
from sslkit.cli import main
from sslkit.errors import UserError
from sslkit.publish import export_detectron2
from sslkit.publish.detectron2 import _plain_twin, _verify, detectron2_weights

NORM = ("weight", "bias", "running_mean", "running_var")


def detectron2_names(blocks: tuple[int, ...], convolutions: int, shortcut_in_first: bool) -> set[str]:
    """The parameter names of detectron2's `build_resnet_backbone`, from how it builds: BasicStem, then res2 to res5."""
    layers = ["stem.conv1"]
    for stage, count in enumerate(blocks, start=2):
        for block in range(count):
            layers += [f"res{stage}.{block}.conv{number}" for number in range(1, convolutions + 1)]
            if block == 0 and (stage > 2 or shortcut_in_first):
                layers.append(f"res{stage}.{block}.shortcut")
    return {f"{layer}.weight" for layer in layers} | {f"{layer}.norm.{part}" for layer in layers for part in NORM}


def test_resnet_50_has_detectron2s_names_and_nothing_else() -> None:
    model = timm.create_model("resnet50", num_classes=0)
    state = model.state_dict()
    weights = detectron2_weights(state)
    assert set(weights) == detectron2_names((3, 4, 6, 3), 3, shortcut_in_first=True)
    assert sum(array.ndim == 4 for array in weights.values()) == 53
    assert sum(name.endswith(".norm.running_var") for name in weights) == 53
    assert all(array.dtype == np.float32 for array in weights.values())
    pairs = {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_mean": "bn1.running_mean",
        "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "res2.0.shortcut.norm.bias": "layer1.0.downsample.1.bias",
        "res4.5.conv3.norm.weight": "layer3.5.bn3.weight",
        "res5.2.conv2.weight": "layer4.2.conv2.weight",
    }
    for theirs, ours in pairs.items():
        np.testing.assert_array_equal(weights[theirs], state[ours].numpy())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_plain_resnets_compute_what_torchvisions_do(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0)
    _verify(model, _plain_twin(model, name), name)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet18d", "plain 7 x 7 stem"),
        ("seresnet50", "not a plain ResNet"),
        ("test_resnet", "plain 7 x 7 stem"),
        ("resnet50_gn", "not a plain ResNet"),
    ],
)
def test_other_resnets_are_refused(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        _plain_twin(timm.create_model(name, num_classes=0), name)


def test_the_same_tensors_with_another_computation_are_refused() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=0, act_layer="silu")
    with pytest.raises(UserError, match="computes other features"):
        _verify(model, _plain_twin(model, "resnet18"), "resnet18")


class Wary(pickle.Unpickler):
    """Knows arrays only."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) != ("numpy", "ndarray"):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return getattr(importlib.import_module(module), name)


@pytest.fixture(scope="module")
def resnet_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detectron2") / "run"
    sslkit.train(small_recipe("moco_v2", "resnet18", train={"max_steps": 1}), folder)
    return folder


def test_the_file_opens_with_arrays_only_and_says_how_to_use_it(resnet_run: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        main(["export", str(resnet_run), str(tmp_path / "out"), "--format", "detectron2"])
    assert left.value.code == 0
    with (tmp_path / "out" / "detectron2.pkl").open("rb") as stream:
        content = Wary(stream, encoding="latin1").load()
    assert set(content) == {"model", "__author__", "matching_heuristics"}
    assert content["matching_heuristics"] is True
    assert set(content["model"]) == detectron2_names((2, 2, 2, 2), 2, shortcut_in_first=False)
    saved = load_file(resnet_run / "encoder" / "model.safetensors")
    np.testing.assert_array_equal(content["model"]["stem.conv1.weight"], saved["conv1.weight"].numpy())
    np.testing.assert_array_equal(
        content["model"]["res3.0.shortcut.norm.running_var"], saved["layer2.0.downsample.1.running_var"].numpy()
    )
    assert content["model"]["res5.1.conv2.weight"].flags.writeable  # detectron2 hands it to torch.from_numpy
    page = (tmp_path / "out" / "README.md").read_text()
    means = re.search(r"PIXEL_MEAN: \[(.*)\]", page)
    assert means is not None
    assert [float(word) for word in means[1].split(",")] == pytest.approx([123.675, 116.28, 103.53])
    for line in ("DEPTH: 18", "STRIDE_IN_1X1: False", "FORMAT: RGB", "FREEZE_AT: 0", "RES2_OUT_CHANNELS: 64"):
        assert line in page


def test_export_refuses_what_it_must(resnet_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="already exists and is not empty"):
        export_detectron2(resnet_run, tmp_path / "full")
    with pytest.raises(UserError, match="not a run folder with an encoder"):
        export_detectron2(tmp_path, tmp_path / "x")
    for backbone, sentence in (
        ({"name": "test_vit", "img_size": 32}, "ResNets only"),
        ({"name": "resnet18", "small_stem": True}, "plain 7 x 7 stem"),
    ):
        run = tmp_path / backbone["name"]
        sslkit.train(small_recipe("moco_v2", backbone["name"], train={"max_steps": 1}, backbone=backbone), run)
        with pytest.raises(UserError, match=sentence):
            export_detectron2(run, tmp_path / "x")
    with pytest.raises(SystemExit) as left:
        main(["export", str(resnet_run), str(tmp_path / "x"), "--format", "onnx"])
    assert left.value.code == 2
    assert "must be timm or detectron2, not 'onnx'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
