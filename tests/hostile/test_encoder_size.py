"""A small encoder folder cannot make sslkit build a model much larger than its weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import cli_error, small_recipe
from safetensors.torch import save_file

import sslkit
from sslkit.errors import UserError
from sslkit.evaluate import load_encoder
from sslkit.evaluate.features.encoder import Encoder
from sslkit.hub.untrusted import check_size
from sslkit.parts.backbone import BackboneConfig, create_backbone

SWIN = {"embed_dim": 8, "depths": [2, 2, 1, 1], "num_heads": [1, 1, 1, 1]}
# By name: timm model, the arguments its weights were saved with, and the ones that its config.json asks for.
LARGE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "attention masks": ("swin_tiny_patch4_window7_224", SWIN, {"img_size": 11200}),
    "attention masks of both": ("swinv2_tiny_window8_256", SWIN, {"img_size": [99_968, 256]}),
    "masks of a wide window": ("swin_tiny_patch4_window7_224", SWIN, {"window_size": 700, "img_size": 2800}),
    "relative positions": ("beit_base_patch16_224", {"depth": 1, "embed_dim": 12}, {"img_size": 32_000}),
    "relative offsets": ("levit_128s", {}, {"img_size": 8192}),
    "offsets in a loop": ("tiny_vit_5m_224", {}, {"window_sizes": [7, 7, 1400, 7]}),
    "rotary positions": (
        "eva02_tiny_patch14_224",
        {"depth": 1, "embed_dim": 12, "num_heads": 1},
        {"img_size": 98_000, "use_abs_pos_emb": False},
    ),
    "a fixed table": ("vit_relpos_small_patch16_224", {"depth": 1, "embed_dim": 12}, {"img_size": 30_000}),
    "many narrow blocks": ("test_vit", {}, {"depth": 90_000, "embed_dim": 1, "num_heads": 1}),
    "many modules": ("test_resnet", {}, {"layers": [90_000, 1, 1, 1], "channels": [1, 1, 1, 1]}),
}


def folder_of(folder: Path, name: str, saved: dict[str, Any], asked: dict[str, Any]) -> Path:
    """An encoder folder whose config.json describes a larger model than its weights."""
    folder.mkdir()
    module = timm.create_model(name, num_classes=0, **saved)
    save_file(module.state_dict(), folder / "model.safetensors")
    config = {"architecture": name, "model_args": {**saved, **asked}, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# Loads each folder named, prints the sentence, and how much more memory was used than before, in MB.
CHILD = """
import resource, sys
from sslkit.errors import UserError
from sslkit.evaluate import load_encoder
from sslkit.parts.backbone import BackboneConfig, create_backbone

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

load_encoder(sys.argv[1])
before = peak()
for folder in sys.argv[2:]:
    spec = BackboneConfig(name="test_vit", img_size=32, pretrained=f"local-dir:{folder}")
    for door in (lambda: load_encoder(folder), lambda: create_backbone(spec)):
        try:
            door()
        except UserError as error:
            print(round(peak() - before), str(error).replace("\\n", " "))
        else:
            print("built", folder)
"""


@pytest.mark.full
def test_what_is_built_is_bounded(tmp_path: Path) -> None:
    honest = folder_of(tmp_path / "honest", "test_vit", {}, {})
    folders = [str(folder_of(tmp_path / str(place), *case)) for place, case in enumerate(LARGE.values())]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(honest), *folders], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(LARGE)
    for line in lines:
        megabytes, sentence = line.split(" ", 1)
        assert "with its weights: it " in sentence, line
        assert int(megabytes) < 300, line


def test_a_runs_recipe_is_bounded_by_its_encoder(tmp_path: Path) -> None:
    recipe = small_recipe("simclr", "test_vit", backbone={"img_size": 32}, train={"max_steps": 1})
    sslkit.train(recipe, tmp_path / "run")
    file = tmp_path / "run/recipe.toml"
    file.write_text(file.read_text().replace("[backbone.args]\n", "[backbone.args]\ndepth = 90000\n"))
    assert "depth = 90000" in file.read_text()
    assert "with its weights" in cli_error(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    finetune = ["eval", "finetune", str(tmp_path / "run"), "--data", "builtin:fashion_mnist", "--head-layers", "1"]
    assert "with its weights" in cli_error(finetune)


def test_where_a_model_is_built_is_not_for_a_folder_to_say(tmp_path: Path) -> None:
    """On another device than meta, a model that is too large would be built before it is refused."""
    refused: list[dict[str, Any]] = [{"device": "cpu", "img_size": 11200}, {"device": "meta"}, {"dtype": "float64"}]
    for place, asked in enumerate(refused):
        folder = folder_of(tmp_path / str(place), "swin_tiny_patch4_window7_224", SWIN, asked)
        spec = BackboneConfig(name="swin_tiny_patch4_window7_224", img_size=224, pretrained=f"local-dir:{folder}")
        for door in (lambda folder=folder: load_encoder(str(folder)), lambda spec=spec: create_backbone(spec)):
            with pytest.raises(UserError, match="cannot be set in a recipe or an encoder folder"):
                door()
    nested = folder_of(tmp_path / "nested", "test_vit", {"img_size": 32}, {"block_fn": {"device": "cpu"}})
    with pytest.raises(UserError, match="may not set device or dtype"):
        load_encoder(str(nested))
    with pytest.raises(UserError, match="'device' cannot be set in a recipe"):
        create_backbone(BackboneConfig(name="test_vit", img_size=32, args={"device": "cpu"}))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet_gn", "swin_tiny_patch4_window7_224"])
def test_honest_models_are_within_bounds(name: str) -> None:
    """Also with a fraction of the usual width and twice the image size, where buffers are much larger than weights."""
    arguments: list[dict[str, Any]] = [{}]
    arguments += [{**SWIN, "img_size": 448}] if name.startswith("swin") else []
    for args in arguments:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0, **args)
        check_size(name, args, {key: tuple(value.shape) for key, value in model.state_dict().items()}, "here")


@pytest.mark.parametrize(("size", "expected"), [((3, 224, 224), 256), ((3, 512, 512), 256), ((3, 4096, 4096), 4)])
def test_a_batch_of_large_images_is_small(size: tuple[int, int, int], expected: int) -> None:
    assert Encoder(torch.nn.Identity(), {"input_size": size}, "", "").batch_size(256) == expected


def test_an_input_of_many_large_channels_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", "test_vit", {}, {})
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] = {"input_size": [4096, 4096, 4096]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="input_size cannot be"):
        load_encoder(str(folder))
    with pytest.raises(UserError, match="input_size cannot be"):
        create_backbone(BackboneConfig(name="test_vit", img_size=32, pretrained=f"local-dir:{folder}"))
