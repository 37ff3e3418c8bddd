"""An encoder folder (``config.json`` and ``model.safetensors``) of unknown origin, checked before it is built.

timm passes a configuration's arguments on as they are. So they are bounded here, and the model is first built without
memory: what would be larger than the weights beside it is refused.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sslkit.errors import UserError, near_miss
from sslkit.hub.meta_build import Bounds, Shapes, build_on_meta

MAX_CONFIG_BYTES = 1_000_000
MAX_NUMBER = 100_000  # of a model's argument; no model has so many blocks, heads, channels or pixels
MAX_SIDE = 4096  # pixels of an input
# timm's, that load or download something else than the folder's weights.
FOREIGN_ARGS = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "pretrained_strict"),
    *("pretrained_model_args", "features_only", "scriptable", "exportable", "no_jit"),
}
PLACEMENT_ARGS = {"device", "dtype"}  # with which a model would not be built on the meta device; timm never saves them
OWN_FORMAT = ("pytorch_model.bin", "pytorch_model.pth", "model.pth")  # PyTorch's, as timm saves it by default
NAMED = 3  # tensors, in a sentence
INPUT_KEYS = ("input_size", "fixed_input_size", "first_conv", "pool_size")  # of a pretrained_cfg, for timm's loading


@dataclass(frozen=True)
class EncoderConfig:
    """What a ``config.json`` says, within bounds.

    Attributes:
        architecture: A timm model, without a tag.
        model_args: timm's arguments, plain and small.
        preprocessing: timm's pretrained_cfg, of which only the picture's treatment counts.
        small_stem: Whether it has sslkit's stem for small images.
        num_classes: Of the classifier that may lie beside the encoder's weights; 0 for none.
    """

    architecture: str
    model_args: dict[str, Any]
    preprocessing: dict[str, Any]
    small_stem: bool
    num_classes: int = 0


def read_encoder_config(folder: Path) -> EncoderConfig:
    """Read ``config.json``, of timm's present form or of the flat one that it had before.

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
    architecture, model_args = config.get("architecture"), config.get("model_args") or {}
    preprocessing = config.get("pretrained_cfg", config)
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        miss = near_miss(str(architecture)[:100], timm.list_models())
        raise UserError(f"{file}: 'architecture' must be a timm model, not {architecture!r:.100}{miss}")
    if not isinstance(model_args, dict):
        raise UserError(f"{file}: 'model_args' must be an object, not {model_args!r:.100}")
    check_model_args(model_args, f"{file}: 'model_args'")
    if not isinstance(preprocessing, dict):
        raise UserError(f"{file}: 'pretrained_cfg' must be an object, not {preprocessing!r:.100}")
    _check_preprocessing(preprocessing, file)
    args = {**_args_of_input(architecture, preprocessing), **model_args}
    classes = config.get("num_classes", preprocessing.get("num_classes"))
    num_classes = classes if type(classes) is int and 0 <= classes <= MAX_NUMBER else 0
    return EncoderConfig(architecture, args, preprocessing, bool(config.get("small_stem", False)), num_classes)


def _args_of_input(architecture: str, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that timm takes from the input's size, where that is not the architecture's own."""
    size: Any = preprocessing.get("input_size")
    own: Any = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    usual = own.input_size if own is not None else (3, 224, 224)
    args: dict[str, Any] = {}
    if size and size[0] != usual[0]:
        args["in_chans"] = size[0]
    if size and preprocessing.get("fixed_input_size") is True and tuple(size[1:]) != tuple(usual[1:]):
        args["img_size"] = list(size[1:])
    return args


def check_model_args(model_args: Mapping[str, Any], where: str) -> None:
    """See that a model's arguments are plain data of a size that models have.

    Raises:
        UserError: They are not; ``where`` opens the sentence.
    """
    reserved = sorted((FOREIGN_ARGS | PLACEMENT_ARGS) & model_args.keys())
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
            raise UserError(f"{file}: not there, or not a file{_instead(file)}")
        with safe_open(file, "pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({_first_line(error)})") from error


def _instead(file: Path) -> str:
    """What to do where the weights lie in a file that only code can read."""
    found = next((name for name in OWN_FORMAT if (file.parent / name).is_file()), "")
    return found and (
        f"; {found} beside it is in PyTorch's own format, which can run code and is not read: save the model again "
        "with timm.models.save_for_hf(model, folder, safe_serialization=True)"
    )


def check_model(config: EncoderConfig, shapes: Shapes, where: str) -> None:
    """See that the model which ``config`` describes is as large as its weights, before it takes memory, and has them.

    Raises:
        UserError: It is larger, lacks weights, or timm cannot build it; ``where`` opens the sentence.
    """
    empty = check_size(config.architecture, config.model_args, shapes, f"{where}: its config.json")
    expected = empty.state_dict().keys()
    missing = sorted(name for name in expected - shapes.keys() if not name.endswith("num_batches_tracked"))
    # Older files have other names, which timm translates; it then fails itself if something is missing.
    if missing and shapes.keys() - expected <= classifier_names(config, shapes):
        raise UserError(
            f"{where}: its weights lack {len(missing)} of the {len(expected)} tensors that a {config.architecture!r} "
            f"has: {named(missing)}"
        )


def check_size(architecture: str, model_args: Mapping[str, Any], shapes: Shapes, where: str) -> nn.Module:
    """See that a model is no larger than weights of these shapes; returns it on the meta device, without a classifier.

    Raises:
        UserError: It is larger, or timm cannot build it; ``where`` opens the sentence.
    """
    try:
        return build_on_meta(architecture, {**model_args, "num_classes": 0}, Bounds.of_weights(shapes))
    except Exception as error:  # unknown arguments make models raise anything
        raise UserError(
            f"{where} does not describe a {architecture!r} that timm can build in the size of its weights: "
            f"{_first_line(error)}"
        ) from error


def classifier_names(config: EncoderConfig, shapes: Shapes) -> set[str]:
    """The tensors that timm's model has only when it classifies: not those of an encoder."""
    bounds = Bounds.of_weights(shapes)
    encoder, classifier = (
        build_on_meta(config.architecture, {**config.model_args, "num_classes": classes}, bounds).state_dict().keys()
        for classes in (0, 2)
    )
    return classifier - encoder


def encoder_state(
    config: EncoderConfig, state: dict[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file that an encoder takes, by timm's present names, and the names of those of a classifier.

    Args:
        config: The encoder.
        state: Of the file, perhaps with a classifier, or with names of before that timm translates.
        own: State of an encoder as it was built.

    Raises:
        UserError: Some are missing, or there are others than a classifier's.
        Exception: Whatever timm raises where it cannot translate.
    """
    own_and_classifier = own.keys() | (
        classifier_names(config, {name: tuple(tensor.shape) for name, tensor in state.items()})
        if state.keys() - own.keys()
        else set()
    )
    missing = sorted(name for name in own.keys() - state.keys() if not name.endswith("num_batches_tracked"))
    unexpected = sorted(state.keys() - own_and_classifier)
    if missing and not unexpected:
        raise UserError(f"lacks {named(missing)}")
    if unexpected and not missing:
        raise UserError(f"has tensors that are no {config.architecture}'s: {named(unexpected)}")
    if unexpected:
        state = _translated(config, state)
    left_out = sorted(state.keys() - own.keys())
    return {name: tensor for name, tensor in state.items() if name not in left_out}, left_out


def _translated(config: EncoderConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors by timm's present names, as timm loads them, all of them."""
    model_args = {**config.model_args, "num_classes": config.num_classes}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    build_on_meta(config.architecture, model_args, Bounds.of_weights(shapes))
    source = {key: value for key, value in config.preprocessing.items() if key in INPUT_KEYS}
    source |= {"state_dict": state, "num_classes": config.num_classes}
    model = timm.create_model(config.architecture, pretrained=True, pretrained_cfg=source, **model_args)
    return dict(model.state_dict())


def named(names: Sequence[str]) -> str:
    """The first few of some tensors' names."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f"{name:.100}" for name in names[:NAMED]) + more


def _leaves(value: Any, depth: int, where: str) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        if not depth or len(value) > 1000:
            raise UserError(f"{where} holds more than models take")
        if isinstance(value, dict) and PLACEMENT_ARGS & value.keys():
            raise UserError(f"{where} may not say device or dtype; leave them out")
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
        and all(type(side) is int for side in said.get("input_size") or [])
        and math.prod(said.get("input_size") or [1]) <= 3 * MAX_SIDE**2,
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
