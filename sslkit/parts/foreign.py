"""A stranger's encoder folder (``config.json`` and ``model.safetensors``), looked at before anything is built from it.

timm passes a configuration's arguments on as they are. So they are bounded here, and the model is first built without
memory: what would be larger than the weights beside it is refused.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sslkit.errors import UserError, near_miss

Shapes = dict[str, tuple[int, ...]]

MAX_CONFIG_BYTES = 1_000_000
MAX_NUMBER = 100_000  # of a model's argument; no model has so many blocks, heads, channels or pixels
MAX_SIDE = 4096  # pixels of an input
# timm's, that load or download something else than the folder's weights.
FOREIGN_ARGS = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "pretrained_strict"),
    *("features_only", "scriptable", "exportable", "no_jit"),
}
# A classifier may stand in the file or the model and not in the other; it is not an encoder's.
HEADROOM = 2.0


@dataclass(frozen=True)
class EncoderConfig:
    """What a ``config.json`` says, within bounds.

    Attributes:
        architecture: A timm model, without a tag.
        model_args: timm's arguments, plain and small.
        preprocessing: timm's pretrained_cfg, of which only the picture's treatment counts.
        small_stem: Whether it has sslkit's stem for small images.
    """

    architecture: str
    model_args: dict[str, Any]
    preprocessing: dict[str, Any]
    small_stem: bool


def read_encoder_config(folder: Path) -> EncoderConfig:
    """Read ``config.json``.

    Raises:
        UserError: It is none, or asks for what no encoder needs.
    """
    file = folder / "config.json"
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{file}: more than {MAX_CONFIG_BYTES} bytes; no encoder needs so much said")
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not readable as JSON ({_first_line(error)})") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: must be a JSON object")
    architecture, model_args = config.get("architecture"), config.get("model_args", {})
    preprocessing = config.get("pretrained_cfg")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        miss = near_miss(str(architecture)[:100], timm.list_models())
        raise UserError(f"{file}: 'architecture' must be a timm model, not {architecture!r:.100}{miss}")
    if not isinstance(model_args, dict):
        raise UserError(f"{file}: 'model_args' must be an object, not {model_args!r:.100}")
    check_model_args(model_args, f"{file}: 'model_args'")
    if not isinstance(preprocessing, dict):
        raise UserError(f"{file}: 'pretrained_cfg' must be an object, not {preprocessing!r:.100}")
    _check_preprocessing(preprocessing, file)
    return EncoderConfig(architecture, dict(model_args), preprocessing, bool(config.get("small_stem", False)))


def check_model_args(model_args: Mapping[str, Any], where: str) -> None:
    """See that a model's arguments are plain data of a size that models have.

    Raises:
        UserError: They are not; ``where`` opens the sentence.
    """
    reserved = sorted(FOREIGN_ARGS & model_args.keys())
    if reserved:
        raise UserError(f"{where}: {reserved[0]!r} is not for a recipe or an encoder folder to set; leave it out")
    for key, value in model_args.items():
        for plain in _leaves(value, depth=4, where=f"{where}: {key!r}"):
            if isinstance(plain, int | float) and not (abs(plain) <= MAX_NUMBER):
                raise UserError(f"{where}: {key!r} is a number beyond {MAX_NUMBER}, which no model has")
            if isinstance(plain, str) and len(plain) > 100:
                raise UserError(f"{where}: {key!r} is longer than any word timm knows")


def tensor_shapes(file: Path) -> Shapes:
    """Names and shapes in a safetensors file, from its header alone.

    Raises:
        UserError: It is not one, or its header does not agree with its length.
    """
    try:
        if not file.is_file():
            raise UserError(f"{file}: not there, or not a file")
        with safe_open(file, "pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({_first_line(error)})") from error


def check_size(config: EncoderConfig, shapes: Shapes, where: str) -> None:
    """See that the model which ``config`` describes is no larger than its weights, before it takes memory.

    Raises:
        UserError: It is larger, or timm cannot build it; ``where`` opens the sentence.
    """
    bound = HEADROOM * sum(map(math.prod, shapes.values())) + 1_000_000
    try:
        with torch.device("meta"), _at_most(int(bound)):
            timm.create_model(config.architecture, **{**config.model_args, "num_classes": 0})
    except Exception as error:  # a stranger's arguments make models raise anything
        raise UserError(
            f"{where}: timm cannot build a {config.architecture!r} of its weights' size from its config.json: "
            f"{_first_line(error)}"
        ) from error


@contextmanager
def _at_most(elements: int) -> Iterator[None]:
    """Stop a model that is being built when its parameters have more elements than these."""
    total = 0

    def count(_module: nn.Module, _name: str, param: nn.Parameter | None) -> None:
        nonlocal total
        total += 0 if param is None else param.numel()
        if total > elements:
            raise UserError("the model it describes is larger than the weights beside it")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _leaves(value: Any, depth: int, where: str) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        if not depth or len(value) > 1000:
            raise UserError(f"{where} holds more than models take")
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner, depth - 1, where)
    elif value is None or isinstance(value, bool | int | float | str):
        yield value
    else:
        raise UserError(f"{where} must be plain data, not a {type(value).__name__}")


def _check_preprocessing(said: dict[str, Any], file: Path) -> None:
    size = said.get("input_size")
    channels = size[0] if isinstance(size, list) and size and type(size[0]) is int and size[0] <= MAX_SIDE else 3

    def numbers(key: str, low: float, high: float, count: int) -> bool:
        value = said.get(key)
        return value is None or (
            isinstance(value, list)
            and len(value) == count
            and all(isinstance(each, int | float) and low <= each <= high for each in value)
        )

    crop_pct = said.get("crop_pct")
    right = {
        "input_size": numbers("input_size", 1, MAX_SIDE, 3)
        and all(isinstance(side, int) for side in said.get("input_size") or []),
        "mean": numbers("mean", -1000, 1000, channels),
        "std": numbers("std", 1e-6, 1000, channels),
        "crop_pct": crop_pct is None or (isinstance(crop_pct, int | float) and 0.05 <= crop_pct <= 2),
        "interpolation": said.get("interpolation")
        in (None, "bicubic", "bilinear", "nearest", "lanczos", "hamming", "box", "random"),
        "crop_mode": said.get("crop_mode") in (None, "center", "squash", "border"),
    }
    for key, is_right in right.items():
        if not is_right:
            raise UserError(f"{file}: 'pretrained_cfg' {key} cannot be {said[key]!r:.100}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
