"""Checks of encoder folders (``config.json`` and ``model.safetensors``) of unknown origin, before they are built.

Arguments for timm must be plain, small values, and a model may not be larger than its weights. To check this, it is
first built on the meta device.
"""

import json
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sslkit.errors import UserError, first_line, near_miss
from sslkit.hub.meta_build import Bounds, Shapes, build_on_meta, shapes_of

MAX_CONFIG_BYTES = 1_000_000
MAX_NUMBER = 100_000  # no model has so many blocks, heads, channels or pixels
MAX_SIDE = 4096  # pixels of an input
# Arguments with which timm loads or downloads other files than the folder's weights.
LOADING_ARGS = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "pretrained_strict"),
    *("pretrained_model_args", "features_only", "scriptable", "exportable", "no_jit"),
}
PLACEMENT_ARGS = {"device", "dtype"}  # they would override the meta device; timm never saves them
PYTORCH_FILES = ("pytorch_model.bin", "pytorch_model.pth", "model.pth")  # timm's names for weights in PyTorch's format
RESAVE = (
    "; {} in the same folder is in PyTorch's own format, which can run code and is not read: save the model again with "
    "timm.models.save_for_hf(model, folder, safe_serialization=True)"
)
MAX_LISTED = 3  # names of tensors in a message
INPUT_KEYS = ("input_size", "fixed_input_size", "first_conv", "pool_size")  # of a pretrained_cfg, needed for loading


@dataclass(frozen=True)
class EncoderConfig:
    """A checked ``config.json``: a timm model without a tag, timm's arguments, and timm's pretrained_cfg.

    ``small_stem`` is sslkit's stem for small images. The weights may have a classifier of ``num_classes``.
    """

    architecture: str
    model_args: dict[str, Any]
    preprocessing: dict[str, Any]
    small_stem: bool
    num_classes: int


def read_encoder_config(folder: Path) -> EncoderConfig:
    """Read and check ``config.json``, in timm's current or its older, flat format; raises `UserError`."""
    file = folder / "config.json"
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{file}: has more than {MAX_CONFIG_BYTES} bytes, too many for a config.json")
        config = json.loads(file.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not readable as JSON ({first_line(error)})") from error
    return parse_encoder_config(config, file)


def parse_encoder_config(config: Any, file: str | Path) -> EncoderConfig:
    """Check the content of a ``config.json``; raises `UserError`, which names the ``file``."""
    if not isinstance(config, dict):
        raise UserError(f"{file}: must be a JSON object")
    architecture, model_args = config.get("architecture"), config.get("model_args") or {}
    preprocessing = config.get("pretrained_cfg", config)
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        hint = near_miss(str(architecture)[:100], timm.list_models())
        raise UserError(f"{file}: 'architecture' must be the name of a timm model, not {architecture!r:.100}{hint}")
    if not isinstance(model_args, dict):
        raise UserError(f"{file}: 'model_args' must be an object, not {model_args!r:.100}")
    check_model_args(model_args, f"{file}: 'model_args'")
    if not isinstance(preprocessing, dict):
        raise UserError(f"{file}: 'pretrained_cfg' must be an object, not {preprocessing!r:.100}")
    _check_preprocessing(preprocessing, file)
    args = {**_input_args(architecture, preprocessing), **model_args}
    classes = config.get("num_classes", preprocessing.get("num_classes"))
    num_classes = classes if type(classes) is int and 0 <= classes <= MAX_NUMBER else 0
    return EncoderConfig(architecture, args, preprocessing, bool(config.get("small_stem", False)), num_classes)


def _input_args(architecture: str, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that timm derives from an input size other than the architecture's default."""
    size: Any = preprocessing.get("input_size")
    default: Any = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    default_size = default.input_size if default is not None else (3, 224, 224)
    args: dict[str, Any] = {}
    if size and size[0] != default_size[0]:
        args["in_chans"] = size[0]
    if size and preprocessing.get("fixed_input_size") is True and tuple(size[1:]) != tuple(default_size[1:]):
        args["img_size"] = list(size[1:])
    return args


def check_model_args(model_args: Mapping[str, Any], where: str) -> None:
    """Raise `UserError`, starting with ``where``, unless timm's arguments are plain data of a usual size."""
    reserved = sorted((LOADING_ARGS | PLACEMENT_ARGS) & model_args.keys())
    if reserved:
        raise UserError(f"{where}: {reserved[0]!r} cannot be set in a recipe or an encoder folder; leave it out")
    for key, value in model_args.items():
        for leaf in _leaves(value, depth=4, where=f"{where}: {key!r}"):
            if isinstance(leaf, int | float) and not (abs(leaf) <= MAX_NUMBER):
                raise UserError(f"{where}: {key!r} must be at most {MAX_NUMBER}")
            if isinstance(leaf, str) and len(leaf) > 100:
                raise UserError(f"{where}: {key!r} must have at most 100 characters")


def tensor_shapes(file: Path) -> Shapes:
    """The shapes in the header of a safetensors file; raises `UserError` if it is another file or is incomplete."""
    try:
        if not file.is_file():
            found = next((name for name in PYTORCH_FILES if (file.parent / name).is_file()), "")
            raise UserError(f"{file}: does not exist or is not a file{found and RESAVE.format(found)}")
        with safe_open(file, "pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: is not a complete safetensors file ({first_line(error)})") from error


def check_model(config: EncoderConfig, shapes: Shapes, where: str) -> None:
    """Raise `UserError`, starting with ``where``, if the model is larger than its weights or they are incomplete."""
    model = check_size(config.architecture, config.model_args, shapes, f"{where}: its config.json")
    expected = model.state_dict().keys()
    missing = missing_names(expected, shapes)
    # Older files have other names, which timm translates. It then raises itself if a tensor is missing.
    if missing and shapes.keys() - expected <= classifier_names(config, shapes):
        raise UserError(
            f"{where}: its weights lack {len(missing)} of the {len(expected)} tensors of a {config.architecture!r}: "
            f"{list_names(missing)}"
        )


def check_size(architecture: str, model_args: Mapping[str, Any], shapes: Shapes, where: str) -> nn.Module:
    """Build a model without a classifier on the meta device; raises `UserError` if it is larger than these weights."""
    try:
        return build_on_meta(architecture, {**model_args, "num_classes": 0}, Bounds.of_weights(shapes))
    except Exception as error:  # timm models raise many types for unknown arguments
        raise UserError(
            f"{where} does not describe a {architecture!r} that timm can build with its weights: {first_line(error)}"
        ) from error


def missing_names(expected: Iterable[str], found: Container[str]) -> list[str]:
    """The expected tensors that a file lacks. Files older than PyTorch 1.0 may lack BatchNorm's counters."""
    return sorted(name for name in expected if name not in found and not name.endswith("num_batches_tracked"))


def classifier_names(config: EncoderConfig, shapes: Shapes) -> set[str]:
    """Names of the tensors that a timm model has only with a classifier."""
    bounds = Bounds.of_weights(shapes)
    encoder, classifier = (
        build_on_meta(config.architecture, {**config.model_args, "num_classes": classes}, bounds).state_dict().keys()
        for classes in (0, 2)
    )
    return classifier - encoder


def encoder_state(
    config: EncoderConfig, state: dict[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Select the encoder's tensors of a file and translate timm's older names.

    ``own`` is the state dict of the encoder as built. Also returns the names of the classifier's tensors. Raises
    `UserError` if tensors are missing or belong to another model, and timm's own errors if it cannot translate them.
    """
    known = set(own)
    if state.keys() - known:
        known |= classifier_names(config, shapes_of(state))
    missing = missing_names(own, state)
    unexpected = sorted(state.keys() - known)
    if missing and not unexpected:
        raise UserError(f"lacks {list_names(missing)}")
    if unexpected and not missing:
        raise UserError(f"has tensors that are not part of a {config.architecture}: {list_names(unexpected)}")
    if unexpected:
        state = _translated(config, state)
    left_out = sorted(state.keys() - own.keys())
    return {name: tensor for name, tensor in state.items() if name not in left_out}, left_out


def _translated(config: EncoderConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under timm's current names, as timm loads them."""
    model_args = {**config.model_args, "num_classes": config.num_classes}
    build_on_meta(config.architecture, model_args, Bounds.of_weights(shapes_of(state)))
    source = {key: value for key, value in config.preprocessing.items() if key in INPUT_KEYS}
    source |= {"state_dict": state, "num_classes": config.num_classes}
    model = timm.create_model(config.architecture, pretrained=True, pretrained_cfg=source, **model_args)
    return dict(model.state_dict())


def list_names(names: Sequence[str], limit: int = MAX_LISTED) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"{name:.100}" for name in names[:limit]) + more


def _leaves(value: Any, depth: int, where: str) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        if not depth or len(value) > 1000:
            raise UserError(f"{where} is nested too deeply or has too many values")
        if isinstance(value, dict) and PLACEMENT_ARGS & value.keys():
            raise UserError(f"{where} may not set device or dtype; leave them out")
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner, depth - 1, where)
    elif value is None or isinstance(value, bool | int | float | str):
        yield value
    else:
        raise UserError(f"{where} must be plain data, not a {type(value).__name__}")


def _check_preprocessing(config: dict[str, Any], file: str | Path) -> None:
    size = config.get("input_size")
    channels = size[0] if isinstance(size, list) and size and type(size[0]) is int and size[0] <= MAX_SIDE else 3

    def numbers(key: str, low: float, high: float, count: int) -> bool:
        value = config.get(key)
        return value is None or (
            isinstance(value, list)
            and len(value) == count
            and all(isinstance(each, int | float) and low <= each <= high for each in value)
        )

    crop_pct = config.get("crop_pct")
    valid = {
        "input_size": numbers("input_size", 1, MAX_SIDE, 3)
        and all(type(side) is int for side in config.get("input_size") or [])
        and math.prod(config.get("input_size") or [1]) <= 3 * MAX_SIDE**2,
        "mean": numbers("mean", -1000, 1000, channels),
        "std": numbers("std", 1e-6, 1000, channels),
        "crop_pct": crop_pct is None or (isinstance(crop_pct, int | float) and 0.05 <= crop_pct <= 2),
        "interpolation": config.get("interpolation")
        in (None, "bicubic", "bilinear", "nearest", "lanczos", "hamming", "box", "random"),
        "crop_mode": config.get("crop_mode") in (None, "center", "squash", "border"),
    }
    if wrong := [key for key, is_valid in valid.items() if not is_valid]:
        raise UserError(f"{file}: 'pretrained_cfg' {wrong[0]} cannot be {config[wrong[0]]!r:.100}")
