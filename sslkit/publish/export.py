"""The encoder as a folder that ``timm.create_model("local-dir:…", pretrained=True)`` loads.

``config.json`` and ``model.safetensors`` in timm's layout, with this run's preprocessing and nothing of the base
model's own card; no pickle. Proven on the way out: the folder is loaded again and must give the same features,
bit for bit.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from sslkit.errors import RunError, UserError
from sslkit.evaluate.features import load_encoder
from sslkit.parts.backbone import create_backbone
from sslkit.publish.card import model_card
from sslkit.recipe import Recipe, load_recipe

# What timm needs of a pretrained_cfg; everything else in it belongs to the weights the architecture came with.
KEPT_CONFIG = (
    *("tag", "custom_load", "license", "num_classes", "first_conv", "classifier"),
    *("input_size", "fixed_input_size", "pool_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"),
)
# Arguments that shape training only and would surprise whoever fine-tunes or rebuilds the encoder.
TRAINING_ARGS = ("num_classes", "zero_init_last", "weight_init", "pretrained")


class EncoderFolderError(RunError):
    """The exported folder does not give back the encoder's features; nothing is left behind."""


def write_encoder(recipe: Recipe, state: dict[str, Tensor], folder: Path, tag: str, license_id: str) -> None:
    """Write ``config.json`` and ``model.safetensors`` for the backbone with these weights.

    The folder is written aside and renamed, so that a reader finds the old encoder or the new one, whole.

    Args:
        recipe: Names the backbone and its preprocessing.
        state: The backbone's state dict, under timm's own names.
        folder: Where to write.
        tag: timm's pretrained tag, such as ``moco_v3_e300``.
        license_id: SPDX id of the licence the weights are given under.
    """
    backbone = _rebuild(recipe, state)
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    _write_config(recipe, backbone, aside / "config.json", tag, license_id)
    weights = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
    _swap(aside, folder)


def export_encoder(run: str | Path, folder: str | Path, license_id: str = "apache-2.0") -> dict[str, Any]:
    """Copy a run's encoder to a folder of its own, with a model card, and prove that it loads.

    Args:
        run: Run folder; its newest checkpoint's encoder is taken.
        folder: Where to write; must not exist or be empty.
        license_id: SPDX id for the card and config.

    Returns:
        What was proven: ``{"features": (N, D) shape, "loads_in_timm": bool}``.

    Raises:
        UserError: No such run, or a folder that holds something.
        EncoderFolderError: The reloaded encoder differs.
    """
    run, folder = Path(run), Path(folder)
    source = run / "encoder"
    if not (source / "model.safetensors").is_file() or not (run / "recipe.toml").is_file():
        raise UserError(f"{run}: no run with an encoder (no {source / 'model.safetensors'}); train it first")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already holds something; export to a new or empty folder")
    if not license_id.strip():
        raise UserError("--license: must be the SPDX id of a licence, such as apache-2.0")
    recipe = load_recipe(run / "recipe.toml")
    state = load_file(source / "model.safetensors")
    tag = json.loads((source / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]["tag"]
    try:
        write_encoder(recipe, state, folder, tag, license_id)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from error
    try:
        proof = _prove(recipe, state, folder)
        (folder / "README.md").write_text(model_card(recipe, run, folder, tag, license_id), encoding="utf-8")
        shutil.copy(run / "recipe.toml", folder / "recipe.toml")
    except BaseException:
        shutil.rmtree(folder)
        raise
    return proof


def _rebuild(recipe: Recipe, state: dict[str, Tensor]) -> nn.Module:
    """The backbone with these weights; whatever it was continued from is not asked for again."""
    backbone = create_backbone(replace(recipe.backbone_spec(), pretrained=False))
    backbone.load_state_dict(state)
    return backbone


def _write_config(recipe: Recipe, backbone: nn.Module, file: Path, tag: str, license_id: str) -> None:
    views = recipe.views
    data_config = {
        "input_size": (3, views.size, views.size),
        "interpolation": "bicubic" if views.interpolation == "bicubic" else "bilinear",
        "mean": views.mean,
        "std": views.std,
        "crop_pct": views.crop_pct,
        "crop_mode": "center",
    }
    pretrained = {"tag": tag, "license": license_id}
    save_config_for_hf(backbone, str(file), model_config={"pretrained_cfg": pretrained}, data_config=data_config)
    config = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: config["pretrained_cfg"][key] for key in KEPT_CONFIG if key in config["pretrained_cfg"]}
    config["pretrained_cfg"] = kept
    # transformers passes num_classes itself and fails on a second one.
    for key in TRAINING_ARGS:
        config.get("model_args", {}).pop(key, None)
    if recipe.backbone.small_stem:
        config["small_stem"] = True
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _prove(recipe: Recipe, state: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    """Load the folder as a stranger would and compare features on noise images, bit for bit."""
    backbone = _rebuild(recipe, state)
    by_timm = not recipe.backbone.small_stem
    if by_timm:
        reloaded = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    else:
        reloaded = load_encoder(str(folder)).module
    size = recipe.backbone_spec().img_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = backbone.eval()(images), reloaded.eval()(images)
    if not torch.isfinite(expected).all():
        raise EncoderFolderError(f"{folder}: the encoder's features are not finite in evaluation; it is not usable")
    if not torch.equal(expected, found):
        raise EncoderFolderError(f"{folder}: the reloaded encoder's features differ from the run's")
    return {"features": tuple(expected.shape), "loads_in_timm": by_timm}


def _swap(aside: Path, folder: Path) -> None:
    """Put the finished folder in the place of the old one."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(aside, folder)
    shutil.rmtree(old, ignore_errors=True)
