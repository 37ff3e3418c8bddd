"""Export of a run's encoder to a folder that ``timm.create_model("local-dir:…", pretrained=True)`` loads."""

import re
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file
from torch import Tensor

from sslkit.errors import UserError, check_path
from sslkit.evaluate.features.encoder import load_encoder
from sslkit.files.atomic import write_text
from sslkit.hub.meta_build import shapes_of
from sslkit.hub.untrusted import read_encoder_config, tensor_shapes
from sslkit.parts.backbone import check_backbone_size
from sslkit.progress import stage
from sslkit.publish.encoder_folder import (
    check_empty,
    check_license,
    check_reloaded,
    create_untrained,
    encoder_config,
    new_folder,
    write_encoder_files,
)
from sslkit.publish.model_card import model_card
from sslkit.publish.redaction import public_recipe, refuse_tokens
from sslkit.recipe.resolve import Recipe, load_recipe


def export_encoder(run: str | Path, folder: str | Path, license_id: str = "apache-2.0") -> dict[str, Any]:
    """Export a run's encoder with a model card, and check that it loads.

    The folder must be new or empty. It is written under a temporary name and appears when it is complete and checked.

    Returns:
        ``{"features": (N, D) shape, "loads_in_timm": bool}``.

    Raises:
        UserError: There is no such run, or the folder is not empty or cannot be written.
        EncoderFolderError: The features differ after reloading, or are not finite.
    """
    run, folder = check_export(run, folder)
    check_license(license_id)
    with new_folder(folder) as temporary:
        return write_export(run, temporary, folder, f"local-dir:{folder.name}", license_id)


def write_export(
    run: Path, temporary: Path, folder: Path, source: str, license_id: str, *, curves: bool = False
) -> dict[str, Any]:
    """Write the files of `export_encoder` to a temporary folder. See `model_card` for ``source`` and ``curves``."""
    recipe = load_recipe(run / "recipe.toml")
    state, tag = _read_encoder(run / "encoder", recipe)
    public, text = public_recipe(run / "recipe.toml")
    with stage("export", 2, "step") as advance:
        write_encoder_files(encoder_config(recipe, license_id), tag, state, temporary)
        advance(1)
        result = _verify(recipe, state, temporary, folder)
    write_text(temporary / "README.md", model_card(public, run, source, tag, license_id, curves=curves))
    write_text(temporary / "recipe.toml", text)
    refuse_tokens(temporary, f"{run / 'recipe.toml'} or {run / 'results.jsonl'}")
    return result


def check_export(run: str | Path, folder: str | Path) -> tuple[Path, Path]:
    """Check that ``run`` is a run and ``folder`` is new or empty, else raise a UserError; returns both as `Path`."""
    check_path(run, "RUN")
    check_path(folder, "FOLDER")
    run, folder = Path(run), Path(folder)
    check_run(run)
    check_empty(folder, "export")
    return run, folder


def check_run(run: Path) -> None:
    """Raise `UserError` unless the run folder has an encoder."""
    weights = run / "encoder" / "model.safetensors"
    if not weights.is_file() or not (run / "recipe.toml").is_file():
        raise UserError(f"{run}: not a run folder with an encoder (no {weights}); train it first")


def _read_encoder(source: Path, recipe: Recipe) -> tuple[dict[str, Tensor], str]:
    """Weights and tag of a run's encoder, after a check that they fit its recipe."""
    tag = read_encoder_config(source).preprocessing.get("tag")
    if not isinstance(tag, str) or not re.fullmatch(r"\w{1,100}", tag):
        raise UserError(f"{source / 'config.json'}: 'pretrained_cfg' tag cannot be {tag!r:.100}")
    shapes = tensor_shapes(source / "model.safetensors")
    check_backbone_size(recipe.backbone_config(), shapes, f"{source.parent / 'recipe.toml'} [backbone]")
    expected = shapes_of(create_untrained(recipe).state_dict())
    if shapes != expected:
        wrong = sorted(name for name in shapes.keys() | expected if shapes.get(name) != expected.get(name))
        raise UserError(f"{source / 'model.safetensors'}: does not fit the run's recipe, such as {wrong[0]:.100}")
    return load_file(source / "model.safetensors"), tag


def _verify(recipe: Recipe, state: dict[str, Tensor], written: Path, folder: Path) -> dict[str, Any]:
    """Load the written files as a user would, and compare the features."""
    backbone = create_untrained(recipe)
    backbone.load_state_dict(state)
    by_timm = not recipe.backbone.small_stem
    if by_timm:
        reloaded = timm.create_model(f"local-dir:{written}", pretrained=True, num_classes=0)
    else:
        reloaded = load_encoder(str(written)).module
    size = recipe.backbone_config().img_size
    shape = check_reloaded(backbone, reloaded, (recipe.views.channels, size, size), folder)
    return {"features": shape, "loads_in_timm": by_timm}
