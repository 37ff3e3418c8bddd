"""Any folder in which timm has saved a model is a MODEL: its classifier, whatever it is called, is left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import cli_error
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from sslkit.errors import UserError
from sslkit.evaluate import load_encoder
from sslkit.parts.backbone import BackboneConfig, create_backbone

TINY_VIT = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}
# Arguments that make them small. Heads are called head, fc, head.fc, classifier, head and head_dist ...
MODELS: dict[str, dict[str, Any]] = {
    "test_vit": {"img_size": 32},
    "test_resnet": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "test_byobnet": {},
    "test_nfnet": {},
    "deit_tiny_distilled_patch16_224": TINY_VIT,
    "levit_128s": {"img_size": 64, "embed_dim": [16, 16, 16], "num_heads": [1, 1, 1], "depth": [1, 1, 1]},
    "swin_tiny_patch4_window7_224": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    "crossvit_tiny_240": {"embed_dim": [16, 16], "num_heads": [1, 1], "depth": [[1, 1, 0]]},
}


def saved(folder: Path, name: str, num_classes: int = 7, **args: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = timm.create_model(name, num_classes=num_classes, **args).eval()
    save_for_hf(model, str(folder), safe_serialization=True)
    return model


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """As timm wrote it before it had a table of its own for the weights."""
    return {**config["pretrained_cfg"], "architecture": config["architecture"], "num_classes": config["num_classes"]}


def rewrite(folder: Path, change: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def without_size(config: dict[str, Any]) -> dict[str, Any]:
    """As a folder is whose size is said beside the weights only."""
    return {**config, "model_args": {key: value for key, value in config["model_args"].items() if key != "img_size"}}


def features(module: torch.nn.Module, size: tuple[int, ...]) -> torch.Tensor:
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found: torch.Tensor = module.eval()(images)
    return found


@pytest.mark.full
@pytest.mark.parametrize("num_classes", [0, 7])
@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_the_saved_model(
    name: str, num_classes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = saved(tmp_path / "m", name, num_classes, **MODELS[name])
    encoder = load_encoder(str(tmp_path / "m"))
    said = capsys.readouterr().err
    assert ("its classifier is left out" in said) == bool(num_classes)
    size = tuple(encoder.preprocessing["input_size"])
    if num_classes:
        model.reset_classifier(0)
    assert torch.equal(features(encoder.module, size), features(model, size))
    assert encoder.random_twin().module.state_dict().keys() == encoder.module.state_dict().keys()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_a_flat_configuration_of_older_versions(name: str, tmp_path: Path) -> None:
    model: Any = saved(tmp_path / "m", name)
    rewrite(tmp_path / "m", flat)
    encoder = load_encoder(str(tmp_path / "m"))
    model.reset_classifier(0)
    size = tuple(encoder.preprocessing["input_size"])
    assert torch.equal(features(encoder.module, size), features(model, size))


def test_the_size_of_the_input_is_the_weights_own(tmp_path: Path) -> None:
    """Older folders say it beside the weights only; timm then builds the model for it."""
    model: Any = saved(tmp_path / "m", "vit_tiny_patch16_224", **{**TINY_VIT, "img_size": 64})
    rewrite(tmp_path / "m", without_size)
    encoder = load_encoder(str(tmp_path / "m"))
    model.reset_classifier(0)
    assert torch.equal(features(encoder.module, (3, 64, 64)), features(model, (3, 64, 64)))


def test_names_of_before_are_translated(tmp_path: Path) -> None:
    """As of DeiT's and Swin's own files, which timm reads with a filter of the model's."""
    args = MODELS["swin_tiny_patch4_window7_224"]
    model: Any = saved(tmp_path / "m", "swin_tiny_patch4_window7_224", **args)
    state = load_file(tmp_path / "m/model.safetensors")
    old = {}
    for key, value in state.items():
        name = key.replace("head.fc.", "head.")
        if ".downsample." in name:  # the authors have it at the end of a stage, timm at the beginning of the next
            stage = int(name.split(".")[1])
            name = name.replace(f"layers.{stage}.", f"layers.{stage - 1}.", 1)
        old[name] = value
    save_file(old, tmp_path / "m/model.safetensors")
    encoder = load_encoder(str(tmp_path / "m"))
    model.reset_classifier(0)
    assert torch.equal(features(encoder.module, (3, 224, 224)), features(model, (3, 224, 224)))


@pytest.mark.parametrize("num_classes", [0, 7])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: {key: value for key, value in state.items() if "norm." not in key}, "weights lack"),
        (lambda state: state | {"decoder.weight": torch.zeros(3)}, "not part of a test_vit: decoder.weight"),
        (lambda state: state | {"blocks.0.norm1.weight": torch.zeros(3)}, "blocks.0.norm1.weight"),
    ],
)
def test_other_differences_are_refused(tmp_path: Path, num_classes: int, change: Any, sentence: str) -> None:
    saved(tmp_path / "m", "test_vit", num_classes, img_size=32)
    save_file(change(load_file(tmp_path / "m/model.safetensors")), tmp_path / "m/model.safetensors")
    assert sentence in cli_error(["eval", "knn", str(tmp_path / "m"), "--data", "builtin:fashion_mnist"])
    if sentence == "weights lack":  # which timm alone would fill with random ones
        with pytest.raises(UserError, match=sentence):
            create_backbone(BackboneConfig(name="test_vit", img_size=32, pretrained=f"local-dir:{tmp_path / 'm'}"))


def test_pytorchs_own_format_is_not_read_and_the_way_out_is_named(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=7)
    save_for_hf(model, str(tmp_path / "m"), safe_serialization=False)
    error = cli_error(["eval", "knn", str(tmp_path / "m"), "--data", "builtin:fashion_mnist"])
    assert "pytorch_model.bin in the same folder" in error
    assert "safe_serialization=True" in error
    save_for_hf(model, str(tmp_path / "m"), safe_serialization=True)
    load_encoder(str(tmp_path / "m"))


def test_a_model_without_pooling_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "m", "test_resnet", 0, global_pool="")
    error = cli_error(["eval", "knn", str(tmp_path / "m"), "--data", "builtin:fashion_mnist"])
    assert "global_pool" in error
