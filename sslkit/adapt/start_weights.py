"""The weights that an adaptation starts from: the encoder that is judged, and the ``[backbone]`` that trains it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from sslkit.errors import UserError
from sslkit.evaluate.features.encoder import Encoder, load_encoder
from sslkit.hub.revisions import is_hub_name
from sslkit.hub.untrusted import read_encoder_config
from sslkit.parts.backbone import RESERVED_ARGS

NOT_OF_THE_MODEL = {*RESERVED_ARGS, "img_size", "weight_init"}


@dataclass(frozen=True)
class Start:
    """An encoder, and how a recipe names it.

    Attributes:
        encoder: With the preprocessing of its own training.
        backbone: The ``[backbone]`` table.
    """

    encoder: Encoder
    backbone: dict[str, Any]

    @property
    def native_size(self) -> int:
        """Side in pixels of the images that the encoder was trained on."""
        return int(self.encoder.preprocessing["input_size"][1])

    @property
    def views(self) -> dict[str, Any]:
        """The keys of ``[views]`` that belong to the weights."""
        config = self.encoder.preprocessing
        interpolation = "bicubic" if config["interpolation"] == "bicubic" else "bilinear"
        return {"mean": list(config["mean"]), "std": list(config["std"]), "interpolation": interpolation}


def read_start(weights: str) -> Start:
    """Load the weights that ``weights`` names: what every command takes as MODEL.

    Raises:
        UserError: There are none, or their encoder cannot be trained further by timm.
    """
    encoder = load_encoder(weights)
    if encoder.channels != 3:
        raise UserError(
            f"{weights}: takes images of {encoder.channels} channels, sslkit adapt only RGB; continue it with sslkit "
            "pretrain, [backbone] pretrained and [adapt]"
        )
    if encoder.small_stem:
        raise UserError(
            f"{weights}: has sslkit's stem for small images, which timm cannot load as pretrained weights; continue "
            "its run instead (sslkit pretrain with --resume)"
        )
    folder = Path(weights.removeprefix("local-dir:")).expanduser()
    folder = folder / "encoder" if (folder / "encoder" / "config.json").is_file() else folder
    args = {key: value for key, value in encoder.model_args.items() if key not in NOT_OF_THE_MODEL}
    named: dict[str, Any]
    if (folder / "config.json").is_file():
        named = {"name": read_encoder_config(folder).architecture, "pretrained": f"local-dir:{folder.resolve()}"}
    elif is_hub_name(weights):
        named = {"name": encoder.architecture, "pretrained": weights}
    else:
        named = {"name": weights, "pretrained": True}
    return Start(encoder, {**named, "args": args} if args else named)


def at_size(encoder: Encoder, size: int) -> Encoder | None:
    """The same weights for images of ``size`` pixels, of which the whole shorter side is seen; None if not possible."""
    channels = encoder.channels
    preprocessing = {**encoder.preprocessing, "input_size": (channels, size, size), "crop_pct": 1.0}
    module: Any = encoder.module
    args = dict(encoder.model_args)
    try:
        if (channels, size, size) != tuple(encoder.preprocessing["input_size"]) and hasattr(module, "set_input_size"):
            args["img_size"] = size
            module = _as_built(encoder, args)
        with torch.no_grad():
            device = next(module.parameters()).device
            module.eval()(torch.zeros(1, channels, size, size, device=device))
    except (AssertionError, RuntimeError, TypeError, ValueError):
        return None
    return replace(encoder, module=module, preprocessing=preprocessing, model_args=args)


def _as_built(encoder: Encoder, args: dict[str, Any]) -> nn.Module:
    """The network that a run with these arguments trains: timm resizes embeddings and tables as it loads the weights.

    `set_input_size` would leave another network where the size also changes the windows, as in Swin.
    """
    weights = {"state_dict": encoder.module.state_dict()}
    options = {**args, "num_classes": 0, "pretrained_cfg_overlay": weights}
    module: Any = timm.create_model(encoder.architecture, pretrained=True, **options)
    module.pretrained_cfg = module.default_cfg = encoder.module.pretrained_cfg  # without the tensors
    built: nn.Module = module
    return built.to(next(encoder.module.parameters()).device)
