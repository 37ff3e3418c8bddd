"""The encoder as a folder that ``timm.create_model("local-dir:…", pretrained=True)`` loads.

``config.json`` and ``model.safetensors`` in timm's layout, with this run's preprocessing and nothing of the base
model's own card; no pickle. Proven on the way out: the folder is loaded again and must give the same features,
bit for bit.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from sslkit.errors import RunError, UserError, check_path
from sslkit.evaluate.features.extraction import load_encoder
from sslkit.files.atomic import whole_folder, write_json, write_tensors, write_text
from sslkit.hub.untrusted import read_encoder_config, tensor_shapes
from sslkit.parts.backbone import check_backbone_size, create_backbone
from sslkit.publish.card import model_card
from sslkit.publish.redaction import public_recipe, refuse_tokens
from sslkit.recipe.resolve import Recipe, load_recipe

# What timm needs of a pretrained_cfg; everything else in it belongs to the weights the architecture came with.
KEPT_CONFIG = (
    *("tag", "custom_load", "license", "num_classes", "first_conv", "classifier"),
    *("input_size", "fixed_input_size", "pool_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"),
)
# Arguments that shape training only and would surprise whoever fine-tunes or rebuilds the encoder.
TRAINING_ARGS = ("num_classes", "zero_init_last", "weight_init", "pretrained")


class EncoderFolderError(RunError):
    """The exported folder does not give back the encoder's features; nothing is left behind."""


def encoder_config(recipe: Recipe, license_id: str) -> dict[str, Any]:
    """What ``config.json`` says of every encoder of this recipe.

    Args:
        recipe: Names the backbone and its preprocessing.
        license_id: SPDX id of the licence the weights are given under.
    """
    views = recipe.views
    data_config = {
        "input_size": (views.channels, views.size, views.size),
        "interpolation": "bicubic" if views.interpolation == "bicubic" else "bilinear",
        "mean": views.mean,
        "std": views.std,
        "crop_pct": views.crop_pct,
        "crop_mode": "center",
    }
    config = timm_config(_build(recipe), data_config, license_id)
    if recipe.backbone.small_stem:
        config["small_stem"] = True
    if views.channels != 3:
        # Where it is told which convolution is the first, timm makes weights for RGB of it, or random ones.
        config["pretrained_cfg"].pop("first_conv", None)
    return config


def timm_config(model: nn.Module, data_config: dict[str, Any], license_id: str) -> dict[str, Any]:
    """timm's ``config.json`` for a model that timm built, without what belongs to other weights of its name.

    Args:
        model: As ``timm.create_model(name, num_classes=0, ...)`` returned it.
        data_config: timm's words for the preprocessing: input_size, interpolation, mean, std, crop_pct, crop_mode.
        license_id: SPDX id of the licence the weights are given under.
    """
    model_config = {"pretrained_cfg": {"license": license_id.lower()}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        save_config_for_hf(model, str(file), model_config=model_config, data_config=data_config)
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: config["pretrained_cfg"][key] for key in KEPT_CONFIG if key in config["pretrained_cfg"]}
    config["pretrained_cfg"] = kept
    # transformers passes num_classes itself and fails on a second one.
    for key in TRAINING_ARGS:
        config.get("model_args", {}).pop(key, None)
    return config


def write_encoder(config: dict[str, Any], tag: str, state: dict[str, Tensor], folder: Path, **metadata: str) -> None:
    """Write ``config.json`` and ``model.safetensors``; a reader finds the old folder or the new one, whole.

    Args:
        config: From `encoder_config`.
        tag: timm's pretrained tag, such as ``moco_v3_e300``.
        state: The backbone's state dict, under timm's own names, contiguous and on the CPU.
        folder: Where to write.
        **metadata: Said in the header of the weights.

    Raises:
        OSError: It could not be written; what was there before still is.
    """
    with whole_folder(folder) as aside:
        fill_encoder(config, tag, state, aside, **metadata)


def fill_encoder(config: dict[str, Any], tag: str, state: dict[str, Tensor], folder: Path, **metadata: str) -> None:
    """Write the two files of `write_encoder` into a folder that is there."""
    tagged = {**config, "pretrained_cfg": {**config["pretrained_cfg"], "tag": tag}}
    write_json(folder / "config.json", tagged)
    write_tensors(folder / "model.safetensors", state, **metadata)


def export_encoder(run: str | Path, folder: str | Path, license_id: str = "apache-2.0") -> dict[str, Any]:
    """Copy a run's encoder to a folder of its own, with a model card, and prove that it loads.

    The folder appears when all is in it and proven. Until then it is made beside, under a hidden name that the next
    call uses again.

    Args:
        run: Run folder; its newest checkpoint's encoder is taken.
        folder: Where to write; must not exist or be empty.
        license_id: SPDX id for the card and config.

    Returns:
        What was proven: ``{"features": (N, D) shape, "loads_in_timm": bool}``.

    Raises:
        UserError: No such run, a folder that holds something, or one that cannot be written.
        EncoderFolderError: The reloaded encoder differs.
    """
    check_path(run, "RUN")
    check_path(folder, "FOLDER")
    run, folder = Path(run), Path(folder)
    source = run / "encoder"
    if not (source / "model.safetensors").is_file() or not (run / "recipe.toml").is_file():
        raise UserError(f"{run}: no run with an encoder (no {source / 'model.safetensors'}); train it first")
    check_empty(folder, "export")
    check_license(license_id)
    recipe = load_recipe(run / "recipe.toml")
    state, tag = _read_encoder(source, recipe)
    public, text = public_recipe(run / "recipe.toml")
    card = model_card(public, run, f"local-dir:{folder.name}", tag, license_id)
    with new_folder(folder) as aside:
        fill_encoder(encoder_config(recipe, license_id), tag, state, aside)
        proof = _prove(recipe, state, aside, folder)
        write_text(aside / "README.md", card)
        write_text(aside / "recipe.toml", text)
        refuse_tokens(aside, f"{run / 'recipe.toml'} or {run / 'results.jsonl'}")
    return proof


def check_empty(folder: Path, what: str) -> None:
    """See that a folder to be written is not there, or empty.

    Raises:
        UserError: It holds something.
    """
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already holds something; {what} to a new or empty folder")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, beside ``folder``, whose place it takes when all is in it; after an error nothing is left.

    Raises:
        UserError: It cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(Path(os.path.abspath(folder))) as aside:
            yield aside
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _read_encoder(source: Path, recipe: Recipe) -> tuple[dict[str, Tensor], str]:
    """Weights and tag of a run's encoder, once they are known to be its recipe's."""
    tag = read_encoder_config(source).preprocessing.get("tag")
    if not isinstance(tag, str) or not re.fullmatch(r"\w{1,100}", tag):
        raise UserError(f"{source / 'config.json'}: 'pretrained_cfg' tag cannot be {tag!r:.100}")
    shapes = tensor_shapes(source / "model.safetensors")
    check_backbone_size(recipe.backbone_config(), shapes, f"{source.parent / 'recipe.toml'} [backbone]")
    expected = {name: tuple(tensor.shape) for name, tensor in _build(recipe).state_dict().items()}
    if shapes != expected:
        wrong = sorted(name for name in shapes.keys() | expected if shapes.get(name) != expected.get(name))
        raise UserError(f"{source / 'model.safetensors'}: does not fit the run's recipe, such as in {wrong[0]:.100}")
    return load_file(source / "model.safetensors"), tag


def check_license(license_id: str) -> None:
    """Raise `UserError` unless it can be the SPDX id of a licence, which is written into cards and configurations."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", license_id):
        raise UserError("--license: must be the SPDX id of a licence, such as apache-2.0")


def _build(recipe: Recipe) -> nn.Module:
    """The backbone; whatever it was continued from is not asked for again."""
    return create_backbone(recipe.backbone_config().model_copy(update={"pretrained": False}))


def _prove(recipe: Recipe, state: dict[str, Tensor], written: Path, folder: Path) -> dict[str, Any]:
    """Load what was written as anybody would, and compare features on noise images, bit for bit.

    Args:
        recipe: The run's.
        state: The encoder's tensors.
        written: Where the files lie.
        folder: What to call them.
    """
    backbone = _build(recipe)
    backbone.load_state_dict(state)
    by_timm = not recipe.backbone.small_stem
    if by_timm:
        reloaded = timm.create_model(f"local-dir:{written}", pretrained=True, num_classes=0)
    else:
        reloaded = load_encoder(str(written)).module
    size = recipe.backbone_config().img_size
    images = torch.randn(2, recipe.views.channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = backbone.eval()(images), reloaded.eval()(images)
    if not torch.isfinite(expected).all():
        raise EncoderFolderError(f"{folder}: the encoder's features are not finite in evaluation; it is not usable")
    if not torch.equal(expected, found):
        raise EncoderFolderError(f"{folder}: the reloaded encoder's features differ from the run's")
    return {"features": tuple(expected.shape), "loads_in_timm": by_timm}
