"""Convert other projects' checkpoints to timm folders, with a record of every tensor.

Only this module reads PyTorch's own format, and only as weights: a file that needs code is refused.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor, nn

from sslkit.errors import UserError, check_path, first_line
from sslkit.files.atomic import DTYPES, sha256_of, write_json
from sslkit.hub.meta_build import UNBOUNDED, Bounds, Shapes, build_on_meta, shapes_of
from sslkit.hub.untrusted import list_names, missing_names, tensor_shapes
from sslkit.parts.backbone import check_name
from sslkit.publish.encoder_folder import (
    check_empty,
    check_license,
    check_reloaded,
    new_folder,
    timm_config,
    write_encoder_files,
)
from sslkit.publish.importing.checkpoint_formats import (
    RELEASED,
    TensorMatch,
    guess_backbone,
    match_tensors,
    vit_arguments,
)
from sslkit.publish.importing.pickle_opcodes import check_opcodes

IMAGE_SIZE = 224  # training resolution of the ResNets
# Keys of the state dict in a checkpoint.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "classy_state_dict", "base_model", "model")
MAX_LISTED = 8  # names in a message


@dataclass(frozen=True)
class Imported:
    """An imported checkpoint.

    Attributes:
        checkpoint_format: Name of the detected format.
        backbone: timm model.
        model_args: Its arguments.
        released: Name of the authors' file with this MD5; else empty.
        sha256: Of the file.
        tensors: What happened to every tensor.
    """

    checkpoint_format: str
    backbone: str
    model_args: dict[str, Any]
    released: str
    sha256: str
    tensors: list[TensorMatch]

    def to_json(self) -> dict[str, Any]:
        """The content of import.json."""
        fields = asdict(self)
        return {"layout": fields.pop("checkpoint_format"), "fates": fields.pop("tensors"), **fields}


def import_checkpoint(
    file: str | Path, folder: str | Path, backbone: str = "", num_heads: int = 0, license_id: str = "unknown"
) -> Imported:
    """Write the encoder of a checkpoint as a folder that timm loads, with ``import.json``, and check that it does.

    The file is PyTorch's (``.pth``, ``.pth.tar``, ``.ckpt`` ...) or ``.safetensors``; the folder must be new or empty.
    ``backbone`` and the number of heads of a ViT are needed if the file does not tell them.

    Raises:
        UserError: The file cannot be read as weights, its format is unknown, or it does not fit the backbone.
        EncoderFolderError: The features differ after reloading; nothing is left behind.
    """
    check_path(file, "FILE")
    check_path(folder, "FOLDER")
    file, folder = Path(file), Path(folder)
    check_empty(folder, "import")
    check_license(license_id)
    if backbone:
        check_name(backbone)
    released, sha256 = _identify(file)
    tensors = read_tensors(file)
    try:
        source, matches = match_tensors(shapes_of(tensors))
        kept = {match.kept_as: tensors[match.name] for match in matches if match.kept_as}
        if sum(tensor.nbytes for tensor in kept.values()) > file.stat().st_size:
            raise UserError("its tensors claim to be larger than the file")
        shapes = shapes_of(kept)
        backbone = backbone or guess_backbone(shapes)
        model_args = vit_arguments(source, shapes, num_heads)
        model = _build(backbone, model_args, shapes, source.name)
        state = _convert_dtypes(model, kept)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    imported = Imported(source.name, backbone, model_args, released, sha256, matches)
    size = model_args.get("img_size", IMAGE_SIZE)
    data_config = {
        "input_size": (3, size, size),
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": source.std,
        "crop_pct": 0.875,
        "crop_mode": "center",
    }
    with new_folder(folder) as temporary:
        write_encoder_files(timm_config(model, data_config, license_id), source.tag, state, temporary)
        write_json(temporary / "import.json", imported.to_json())
        model.load_state_dict(state)
        reloaded = timm.create_model(f"local-dir:{temporary}", pretrained=True, num_classes=0)
        check_reloaded(model, reloaded, (3, size, size), folder, not_finite=UserError)
    return imported


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint; runs no code in it, and raises `UserError` if it needs more than plain data."""
    if file.suffix == ".safetensors":
        tensor_shapes(file)
        content: Any = load_file(file)
    else:
        content = _read_weights_only(file)
    content = content if isinstance(content, Mapping) else {}
    for _ in STATE_DICT_KEYS:
        content = next((content[key] for key in STATE_DICT_KEYS if _is_filled_dict(content.get(key))), content)
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        # VISSL has separate dicts for trunk and heads.
        inner = {f"{name}.{key}": each for key, each in value.items()} if _is_filled_dict(value) else {name: value}
        tensors |= {key: each for key, each in inner.items() if isinstance(key, str) and _is_dense(each)}
    if not tensors:
        raise UserError(f"{file}: has no tensors where checkpoints have them ({', '.join(STATE_DICT_KEYS)})")
    return tensors


def _is_filled_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in DTYPES


def _read_weights_only(file: Path) -> Any:
    try:
        check_opcodes(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except Exception as error:  # malformed files raise many types
        raise UserError(
            f"{file}: is not a checkpoint that can be read as weights, or is incomplete ({first_line(error, 150)})"
        ) from error


def _identify(file: Path) -> tuple[str, str]:
    """The authors' name of a file that they published, by its MD5; else empty. And the SHA-256 of the file."""
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "no such file"
        raise UserError(f"{file}: {what}; give a checkpoint, such as moco_v2_800ep_pretrain.pth.tar")
    try:
        with file.open("rb") as stream:
            md5 = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        sha256 = sha256_of(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    expected = RELEASED.get(file.name, "")
    if not md5.startswith(expected):
        raise UserError(
            f"{file}: has the name of a file of MoCo's authors, whose MD5 starts with {expected}, but its MD5 starts "
            f"with {md5[:8]}: it is incomplete or was altered; download it again, or rename it"
        )
    return next((name for name, prefix in RELEASED.items() if md5.startswith(prefix)), ""), sha256


def _build(backbone: str, model_args: dict[str, Any], shapes: Shapes, source: str) -> nn.Module:
    """Build the timm model, after a check that the tensors fit it."""
    bounds = Bounds.of_weights(shapes) if model_args else UNBOUNDED
    try:
        empty = build_on_meta(backbone, {"num_classes": 0, **model_args}, bounds)
    except Exception as error:  # timm models raise many types for unsuitable arguments
        raise UserError(f"timm cannot build {backbone} with {model_args}: {first_line(error, 150)}") from error
    if differences := _differences(shapes, shapes_of(empty.state_dict())):
        raise UserError(f"its encoder ({source}) does not fit timm's {backbone}: {differences}")
    built: nn.Module = timm.create_model(backbone, pretrained=False, num_classes=0, **model_args)
    return built


def _differences(found: Shapes, expected: Shapes) -> str:
    unexpected = [name for name in found if name not in expected]
    wrong = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    kinds = [("missing", missing_names(expected, found)), ("unexpected", unexpected), ("wrong shape", wrong)]
    return "; ".join(f"{len(names)} {kind}: {list_names(names, MAX_LISTED)}" for kind, names in kinds if names)


def _convert_dtypes(model: nn.Module, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors in the model's dtypes. The model's own values where the file has none."""
    own = model.state_dict()
    for name, tensor in kept.items():
        if own[name].is_floating_point() and not tensor.is_floating_point():
            raise UserError(f"{name} is {tensor.dtype}: the weights are quantised, which is not supported")
    return {
        name: kept[name].to(tensor.dtype).clone(memory_format=torch.contiguous_format) if name in kept else tensor
        for name, tensor in own.items()
    }
