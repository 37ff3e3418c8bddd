"""What leaves must load elsewhere: in timm without sslkit, and in transformers, with the same features."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import small_recipe
from safetensors.torch import load_file
from transformers import AutoModel

import sslkit
from sslkit.errors import UserError
from sslkit.evaluate import load_encoder
from sslkit.publish import EncoderFolderError, encoder_folder, export_encoder

VIT = {"img_size": 32, "args": {"num_heads": 2}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = small_recipe("moco_v3", "test_vit", train={"max_steps": 2}, backbone={"name": "test_vit", **VIT})
    folder = tmp_path_factory.mktemp("runs") / "vit"
    sslkit.train(recipe, folder)
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "encoder"
    proof = export_encoder(run, folder, license_id="mit")
    assert proof == {"features": (2, 64), "loads_in_timm": True}
    return folder


def test_keys_are_timms_and_nothing_is_pickled(exported: Path) -> None:
    bare = timm.create_model("test_vit", num_classes=0, img_size=32).state_dict()
    saved = load_file(exported / "model.safetensors")
    assert {name: value.shape for name, value in saved.items()} == {name: value.shape for name, value in bare.items()}
    assert sorted(file.name for file in exported.iterdir()) == [
        *("README.md", "config.json", "model.safetensors", "recipe.toml")
    ]


def test_config_carries_this_runs_facts_and_no_one_elses(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["architecture"] == "test_vit"
    assert config["model_args"]["img_size"] in (32, [32, 32])
    assert config["model_args"]["num_heads"] == 2
    assert "num_classes" not in config["model_args"]
    pretrained = config["pretrained_cfg"]
    assert pretrained["mean"] == [0.485, 0.456, 0.406]
    assert pretrained["input_size"] == [3, 32, 32]
    assert pretrained["tag"] == "moco_v3_e0"
    assert pretrained["license"] == "mit"
    assert not {"url", "origin_url", "hf_hub_id", "paper_ids", "test_input_size"} & pretrained.keys()


@pytest.mark.full
def test_timm_alone_gives_the_same_features(exported: Path, run: Path) -> None:
    """A clean process that never imports sslkit."""
    program = (
        "import sys, timm, torch\n"
        f"model = timm.create_model('local-dir:{exported}', pretrained=True, num_classes=0).eval()\n"
        "x = torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32)\n"
        "assert 'sslkit' not in sys.modules\n"
        "print(model(x).double().flatten().tolist())\n"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    x = torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with torch.inference_mode():
        ours = load_encoder(str(run)).module.eval()(x)
    assert json.loads(printed) == ours.double().flatten().tolist()


def test_transformers_gives_the_same_features(exported: Path) -> None:
    x = torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with torch.inference_mode():
        theirs = AutoModel.from_pretrained(exported).eval()(pixel_values=x).pooler_output
        ours = load_encoder(str(exported)).module.eval()(x)
    assert torch.equal(theirs, ours)


def test_another_number_of_classes_and_image_size_load(exported: Path) -> None:
    model = timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=7, img_size=64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_export_refuses_what_it_must(run: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already exists and is not empty"):
        export_encoder(run, exported)
    with pytest.raises(UserError, match="not a run folder with an encoder"):
        export_encoder(tmp_path, tmp_path / "x")


def test_a_difference_after_reloading_is_caught(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = encoder_folder.write_tensors

    def tampered(file: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> dict[str, object]:
        return write(file, {name: value + 1e-3 for name, value in tensors.items()}, **metadata)

    monkeypatch.setattr(encoder_folder, "write_tensors", tampered)
    with pytest.raises(EncoderFolderError, match="features differ"):
        export_encoder(run, tmp_path / "new" / "deep" / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_small_stem_is_rebuilt_by_sslkit(tmp_path: Path) -> None:
    recipe = small_recipe(
        "moco_v1", "resnet18", train={"max_steps": 1}, backbone={"name": "resnet18", "small_stem": True}
    )
    sslkit.train(recipe, tmp_path / "run")
    assert export_encoder(tmp_path / "run", tmp_path / "out")["loads_in_timm"] is False
    with pytest.raises(RuntimeError, match="conv1"):
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: sslkit" in card
    assert "- timm" not in card
    encoder = load_encoder(str(tmp_path / "out"))
    assert encoder.module(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    assert encoder.random_twin().module.conv1.kernel_size == (3, 3)
