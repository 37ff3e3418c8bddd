"""Others' checkpoints into timm folders, with a record of what became of every tensor.

The one file of sslkit that reads PyTorch's own format, and only as weights: a file that needs code to be read is
refused, and what it asked for is named.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sslkit.errors import UserError, check_path
from sslkit.files.atomic import DTYPES, write_json
from sslkit.hub.meta_build import UNBOUNDED, Bounds, build_on_meta
from sslkit.hub.untrusted import tensor_shapes
from sslkit.parts.backbone import check_name
from sslkit.publish.export import (
    EncoderFolderError,
    check_empty,
    check_license,
    fill_encoder,
    new_folder,
    timm_config,
)
from sslkit.publish.importing.checkpoint_formats import RELEASED, Fate, Layout, guess_backbone, sort_out, vit_arguments
from sslkit.publish.importing.pickle_opcodes import check_instructions

IMAGENET_MEAN = (0.485, 0.456, 0.406)
SIDE = 224  # pixels at which ResNets were trained
# Where the tensors lie in a file that holds more than them.
INSIDE = ("state_dict", "model_state_dict", "classy_state_dict", "base_model", "model")
SHOWN = 8  # names in a sentence


@dataclass(frozen=True)
class Imported:
    """What was imported.

    Attributes:
        layout: Whose file it was.
        backbone: timm model.
        model_args: timm's arguments for it.
        released: Name of the authors' file, if its MD5 begins as theirs; else empty.
        sha256: Of the file.
        fates: What became of every tensor.
    """

    layout: str
    backbone: str
    model_args: dict[str, Any]
    released: str
    sha256: str
    fates: list[Fate]


def import_checkpoint(
    file: str | Path, folder: str | Path, backbone: str = "", num_heads: int = 0, license_id: str = "unknown"
) -> Imported:
    """Write the encoder of somebody's checkpoint as a folder that timm loads, and prove that it does.

    Args:
        file: ``.pth``, ``.pth.tar``, ``.ckpt`` ... of PyTorch, or ``.safetensors``.
        folder: Where to write; must not exist or be empty. ``import.json`` in it is what is returned here.
        backbone: timm name, where the shapes do not tell.
        num_heads: Of a ViT, where the layout does not tell.
        license_id: SPDX id of the weights' licence.

    Raises:
        UserError: The file cannot be read as weights, is of no known layout, or does not fit the backbone; names every
            kind of difference.
        EncoderFolderError: The folder does not give back the file's features; nothing is left behind.
    """
    check_path(file, "FILE")
    check_path(folder, "FOLDER")
    file, folder = Path(file), Path(folder)
    check_empty(folder, "import")
    check_license(license_id)
    if backbone:
        check_name(backbone)
    md5, sha256 = _digests(file)
    released = _released(file, md5)
    tensors = read_tensors(file)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        layout, fates = sort_out(shapes)
        kept = {fate.kept_as: tensors[fate.name] for fate in fates if fate.kept_as}
        if sum(tensor.nbytes for tensor in kept.values()) > file.stat().st_size:
            raise UserError("its tensors claim to be larger than the file")
        kept_shapes = {name: tuple(tensor.shape) for name, tensor in kept.items()}
        backbone = backbone or guess_backbone(kept_shapes)
        model_args = vit_arguments(layout, kept_shapes, num_heads)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    model = _build(backbone, model_args, kept_shapes, f"{file} ({layout.name})")
    try:
        state = _fitted(model, kept)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    imported = Imported(layout.name, backbone, model_args, released, sha256, fates)
    _write(imported, layout, model, state, folder, license_id)
    return imported


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, wherever in it they lie; nothing in it is run.

    Raises:
        UserError: It is no checkpoint, is torn, or needs more than tensors and plain data to be read.
    """
    if file.suffix == ".safetensors":
        tensor_shapes(file)
        content: Any = load_file(file)
    else:
        content = _read_weights_only(file)
    for _ in INSIDE:
        key = next((key for key in INSIDE if isinstance(content, Mapping) and _is_table(content.get(key))), None)
        if key is None:
            break
        content = content[key]
    found: dict[str, Tensor] = {}
    if isinstance(content, Mapping):
        for name, value in content.items():
            # VISSL keeps trunk and heads apart.
            inner = {f"{name}.{key}": each for key, each in value.items()} if _is_table(value) else {name: value}
            found |= {key: each for key, each in inner.items() if isinstance(key, str) and _is_plain(each)}
    if not found:
        raise UserError(f"{file}: holds no tensors, at least not where checkpoints have them ({', '.join(INSIDE)})")
    return found


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in DTYPES


def _read_weights_only(file: Path) -> Any:
    try:
        check_instructions(file)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file makes the reader raise anything
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise UserError(f"{file}: not a checkpoint that can be read as weights, or torn ({first})") from error


def _digests(file: Path) -> tuple[str, str]:
    try:
        if not file.is_file():
            raise UserError(f"{file}: no such file; give a checkpoint, such as moco_v2_800ep_pretrain.pth.tar")
        with file.open("rb") as stream:
            md5 = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            stream.seek(0)
            return md5, hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def _released(file: Path, md5: str) -> str:
    """Which file of the authors it is, as far as they published sums."""
    expected = RELEASED.get(file.name)
    if expected is not None and not md5.startswith(expected):
        raise UserError(
            f"{file}: is named as a file of MoCo's authors whose MD5 begins with {expected}, and its own begins with "
            f"{md5[:8]}: torn or altered; download it again, or give it another name"
        )
    return next((name for name, beginning in RELEASED.items() if md5.startswith(beginning)), "")


def _build(backbone: str, model_args: dict[str, Any], shapes: dict[str, tuple[int, ...]], what: str) -> nn.Module:
    """The model, once its tensors are known to be the file's."""
    try:
        empty = build_on_meta(
            backbone, {"num_classes": 0, **model_args}, Bounds.of_weights(shapes) if model_args else UNBOUNDED
        )
    except Exception as error:  # arguments from a file make models raise anything
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise UserError(f"{what}: timm cannot build {backbone} with {model_args}: {first}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    if differences := _differences(shapes, expected):
        raise UserError(f"{what} does not fit timm's {backbone}: {differences}")
    built: nn.Module = timm.create_model(backbone, pretrained=False, num_classes=0, **model_args)
    return built


def _differences(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> str:
    def listed(names: list[str]) -> str:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return ", ".join(names[:SHOWN]) + more

    # Files older than PyTorch 1.0 lack the counters.
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in expected]
    wrong = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    parts = [("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong)]
    return "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in parts if names)


def _fitted(model: nn.Module, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors in the model's types, which hold what half precision held."""
    own = model.state_dict()
    for name, tensor in kept.items():
        if own[name].is_floating_point() and not tensor.is_floating_point():
            raise UserError(f"{name} is of {tensor.dtype}: quantised weights, whose scales are not among the tensors")
    return {
        name: kept[name].to(tensor.dtype).clone(memory_format=torch.contiguous_format) if name in kept else tensor
        for name, tensor in own.items()
    }


def _write(
    imported: Imported, layout: Layout, model: nn.Module, state: dict[str, Tensor], folder: Path, license_id: str
) -> None:
    size = imported.model_args.get("img_size", SIDE)
    data_config = {
        "input_size": (3, size, size),
        "interpolation": "bilinear",
        "mean": IMAGENET_MEAN,
        "std": layout.std,
        "crop_pct": 0.875,
        "crop_mode": "center",
    }
    with new_folder(folder) as aside:
        fill_encoder(timm_config(model, data_config, license_id), layout.tag, state, aside)
        write_json(aside / "import.json", asdict(imported))
        _prove(model, state, aside, folder, size)


def _prove(model: nn.Module, state: dict[str, Tensor], written: Path, folder: Path, size: int) -> None:
    """Load what was written, to become ``folder``, and compare features on noise images, bit for bit."""
    model.load_state_dict(state)
    reloaded = timm.create_model(f"local-dir:{written}", pretrained=True, num_classes=0)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = model.eval()(images), reloaded.eval()(images)
    if not torch.isfinite(expected).all():
        raise UserError(f"{folder}: not written, for the encoder's features are not finite; it is not usable")
    if not torch.equal(expected, found):
        raise EncoderFolderError(f"{folder}: the reloaded encoder's features differ from the file's")
