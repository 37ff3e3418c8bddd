"""Folders in timm's format (``config.json``, ``model.safetensors``), as a run's ``encoder/`` and exports have them."""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from sslkit.errors import RunError, UserError
from sslkit.files.atomic import atomic_folder, write_json, write_tensors
from sslkit.parts.backbone import create_backbone
from sslkit.recipe.resolve import Recipe

# Keys of pretrained_cfg that timm needs. The others belong to timm's pretrained weights of the architecture.
KEPT_CONFIG = (
    *("tag", "custom_load", "license", "num_classes", "first_conv", "classifier"),
    *("input_size", "fixed_input_size", "pool_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"),
)
# Arguments for training only, which should not apply when the encoder is fine-tuned.
TRAINING_ARGS = ("num_classes", "zero_init_last", "weight_init", "pretrained")


class EncoderFolderError(RunError):
    """The written folder does not reproduce the encoder's features. The folder has been removed."""


def encoder_config(recipe: Recipe, license_id: str) -> dict[str, Any]:
    """The ``config.json`` of a recipe's encoder, with the SPDX id of the licence of its weights."""
    views = recipe.views
    data_config = {
        "input_size": (views.channels, views.size, views.size),
        "interpolation": "bicubic" if views.interpolation == "bicubic" else "bilinear",
        "mean": views.mean,
        "std": views.std,
        "crop_pct": views.crop_pct,
        "crop_mode": "center",
    }
    config = timm_config(create_untrained(recipe), data_config, license_id)
    if recipe.backbone.small_stem:
        config["small_stem"] = True
    if views.channels != 3:
        # With the name of the first convolution, timm would convert its weights to RGB or replace them.
        config["pretrained_cfg"].pop("first_conv", None)
    return config


def create_untrained(recipe: Recipe) -> nn.Module:
    """The recipe's backbone with random weights; pretrained weights that the run started from are not loaded."""
    return create_backbone(recipe.backbone_config().model_copy(update={"pretrained": False}))


def create_start(recipe: Recipe) -> tuple[str, nn.Module] | None:
    """The pretrained weights that a run of the recipe begins from, with a name; None if it begins from random ones.

    Raises `UserError` if they cannot be had.
    """
    pretrained = recipe.backbone.pretrained
    if not pretrained:
        return None
    with torch.random.fork_rng(devices=[]):
        backbone = create_backbone(recipe.backbone_config())
    return f"the start ({pretrained if isinstance(pretrained, str) else recipe.backbone.name})", backbone


def timm_config(model: nn.Module, data_config: dict[str, Any], license_id: str) -> dict[str, Any]:
    """timm's ``config.json`` for a timm model, without the keys of other weights of that architecture.

    ``data_config`` is timm's: input_size, interpolation, mean, std, crop_pct, crop_mode.
    """
    model_config = {"pretrained_cfg": {"license": license_id.lower()}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        save_config_for_hf(model, str(file), model_config=model_config, data_config=data_config)
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: config["pretrained_cfg"][key] for key in KEPT_CONFIG if key in config["pretrained_cfg"]}
    config["pretrained_cfg"] = kept
    # transformers passes num_classes itself and fails if it is given twice.
    for key in TRAINING_ARGS:
        config.get("model_args", {}).pop(key, None)
    return config


def write_encoder(config: dict[str, Any], tag: str, state: dict[str, Tensor], folder: Path, **metadata: str) -> None:
    """Write `write_encoder_files` to a folder, which is replaced atomically; after an `OSError` it is unchanged."""
    with atomic_folder(folder) as temporary:
        write_encoder_files(config, tag, state, temporary, **metadata)


def write_encoder_files(
    config: dict[str, Any], tag: str, state: dict[str, Tensor], folder: Path, **metadata: str
) -> None:
    """Write ``config.json`` and ``model.safetensors`` to an existing folder.

    ``config`` is an `encoder_config`, ``tag`` is timm's pretrained tag such as ``moco_v3_e300``, and ``state`` is the
    backbone's state dict, contiguous and on the CPU. The header of the weights has the metadata.
    """
    tagged = {**config, "pretrained_cfg": {**config["pretrained_cfg"], "tag": tag}}
    write_json(folder / "config.json", tagged)
    write_tensors(folder / "model.safetensors", state, **metadata)


def check_reloaded(
    model: nn.Module,
    reloaded: nn.Module,
    input_size: tuple[int, int, int],
    folder: Path,
    not_finite: type[Exception] = EncoderFolderError,
) -> tuple[int, ...]:
    """Check that a reloaded encoder returns the same features on noise images of ``input_size`` (C, H, W), bit for bit.

    Returns their shape. Raises `EncoderFolderError` if they differ, and ``not_finite`` if they are not finite.
    """
    expected, found = features_on_noise(model, reloaded, input_size)
    if not torch.isfinite(expected).all():
        raise not_finite(f"{folder}: not written, because the encoder's features are not finite (NaN or infinity)")
    if not torch.equal(expected, found):
        raise EncoderFolderError(f"{folder}: not written, because the features differ after reloading")
    return tuple(expected.shape)


def features_on_noise(model: nn.Module, other: nn.Module, input_size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The features of both models on the same two noise images of size (C, H, W)."""
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.eval()(images), other.eval()(images)


def check_empty(folder: Path, action: str) -> None:
    """Raise `UserError` unless the folder does not exist or is empty."""
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already exists and is not empty; {action} to a new or empty folder")


def check_license(license_id: str) -> None:
    """Raise `UserError` if this cannot be the SPDX id of a licence."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", license_id):
        raise UserError("--license: must be the SPDX id of a licence, such as apache-2.0")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``folder`` on exit. If it cannot be written, raises `UserError`.

    If an exception is raised, parent folders that were made for it are removed.
    """
    final = Path(os.path.abspath(folder))
    made = [parent for parent in final.parents if not parent.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(final) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        for parent in made:
            with suppress(OSError):  # it holds the new folder
                parent.rmdir()
