"""Frozen encoders: a backbone with its preprocessing, loaded by name."""

import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config
from torch import Tensor, nn

from sslkit.distributed.sharding import local_shard
from sslkit.errors import UserError, check_path, first_line
from sslkit.evaluate.features.transforms import Transform, evaluation_transform, training_transform
from sslkit.hub.availability import quiet_hub, unavailable_reason
from sslkit.hub.revisions import is_hub_name, resolve_hub_encoder, resolve_timm_weights
from sslkit.hub.untrusted import check_model, encoder_state, list_names, read_encoder_config, tensor_shapes
from sslkit.parts.backbone import BackboneConfig, family, model_hint, replace_stem_for_small_images
from sslkit.terminal import print_message

MAX_BATCH_ELEMENTS = 256 * 3 * 512**2


RANDOM_INIT = "random init"  # name of an encoder with random weights


@dataclass(frozen=True)
class Encoder:
    """A backbone without a classifier, and the preprocessing of its inputs.

    Attributes:
        module: (B, C, H, W) -> (B, D), with C from ``preprocessing``.
        preprocessing: timm's data config: input_size, interpolation, mean, std, crop_pct, crop_mode.
        description: Name in tables and messages.
        architecture: Name of the timm model.
        model_args: Arguments of the timm model.
        small_stem: Whether the stem was replaced by `replace_stem_for_small_images`.
        revision: Commit on the Hugging Face Hub that the weights were loaded from; empty if from elsewhere.
    """

    module: nn.Module
    preprocessing: dict[str, Any]
    description: str
    architecture: str
    model_args: dict[str, Any] = field(default_factory=dict)
    small_stem: bool = False
    revision: str = ""

    def transform(self) -> Transform:
        """timm's transform for evaluation: resize, centre crop, normalise."""
        return evaluation_transform(self.preprocessing)

    def training_transform(self) -> Transform:
        """Random resized crop (area 0.08 to 1) and flip: the augmentation of the papers' linear protocols."""
        return training_transform(self.preprocessing)

    @property
    def channels(self) -> int:
        """Number of input channels."""
        return int(self.preprocessing["input_size"][0])

    @property
    def is_vit(self) -> bool:
        """Whether the architecture is a plain ViT."""
        return family(self.architecture) == "vit"

    def batch_size(self, requested: int) -> int:
        """The requested batch size, or less where the images are so large that a batch could fill the memory."""
        elements = math.prod(int(side) for side in self.preprocessing["input_size"])
        return max(min(requested, MAX_BATCH_ELEMENTS // elements), 1)

    def random_twin(self, seed: int = 0) -> "Encoder":
        """The same architecture with timm's random initialisation."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = build_backbone(self.architecture, self.model_args, self.small_stem)
        return replace(self, module=module, description=RANDOM_INIT, revision="")

    def copy(self, **model_args: Any) -> nn.Module:
        """A copy of the module, built with further timm arguments if the architecture accepts them."""
        try:
            module = build_backbone(self.architecture, {**self.model_args, **model_args}, self.small_stem)
        except TypeError:
            module = build_backbone(self.architecture, self.model_args, self.small_stem)
        module.load_state_dict(self.module.state_dict())
        return module


def load_encoder(name: str) -> Encoder:
    """Load an encoder. Raises `UserError` if there is no such encoder, or its weights do not fit.

    Args:
        name: A run folder, an exported folder, ``local-dir:PATH``, ``hf_hub:user/repo`` (newest commit),
            ``hf_hub:user/repo@revision``, or a timm name (with its pretrained weights).
    """
    check_path(name, "MODEL")
    folder = _find_encoder_folder(name)
    if folder is not None:
        return _load_folder(folder, name)
    if is_hub_name(name):
        with quiet_hub():
            found = resolve_hub_encoder(name)
        return replace(_load_folder(found.folder, found.description), revision=found.revision)
    if not timm.is_model(name):
        raise UserError(f"{name}: is not a run folder, an exported folder or a timm model{model_hint(name)}")
    return _load_from_timm(name)


def build_backbone(architecture: str, model_args: dict[str, Any], small_stem: bool) -> nn.Module:
    """A backbone of this architecture with random weights."""
    module: nn.Module = timm.create_model(architecture, **{**model_args, "num_classes": 0})
    if small_stem:
        replace_stem_for_small_images(module, BackboneConfig(name=architecture, img_size=0))
    return module


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of the names and values of all parameters and buffers; for sharded tensors, of the local shard."""
    tensors = {name: local_shard(tensor.detach()) for name, tensor in module.state_dict().items()}
    values = [tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors.values()]
    if any(each.is_cuda for each in values):  # one download instead of one for each
        values = list(torch.cat(values).cpu().split([len(each) for each in values]))
    digest = hashlib.sha256()
    for name, each in zip(tensors, values, strict=True):
        digest.update(name.encode())
        digest.update(each.cpu().numpy().tobytes())
    return digest.hexdigest()


def _find_encoder_folder(name: str) -> Path | None:
    path = Path(name.removeprefix("local-dir:")).expanduser()
    if (path / "encoder" / "config.json").is_file():
        return path / "encoder"
    if (path / "config.json").is_file():
        return path
    if path.is_dir() or name.startswith("local-dir:"):
        raise UserError(f"{name or 'the empty name'}: holds no encoder (no config.json, no encoder/config.json)")
    return None


def _load_folder(folder: Path, name: str) -> Encoder:
    config = read_encoder_config(folder)
    check_model(config, tensor_shapes(folder / "model.safetensors"), name)
    try:
        module = build_backbone(config.architecture, config.model_args, config.small_stem)
        state: dict[str, Tensor] = load_file(folder / "model.safetensors")
        own_state, left_out = encoder_state(config, state, module.state_dict())
        module.load_state_dict(own_state)
        data_config = resolve_data_config(pretrained_cfg={"architecture": config.architecture, **config.preprocessing})
    except Exception as error:  # timm models raise many types for unknown arguments
        reason = " ".join((str(error).strip() or type(error).__name__).splitlines())[:300]
        raise UserError(f"{name}: {folder} is not a loadable encoder: {reason}") from error
    if left_out:
        print_message(f"{name}: its classifier is left out ({list_names(left_out)})")
    return Encoder(module, data_config, name, config.architecture, config.model_args, config.small_stem)


def _load_from_timm(name: str) -> Encoder:
    try:
        with quiet_hub():
            revision, arguments = resolve_timm_weights(name)
            module = timm.create_model(name, pretrained=True, num_classes=0, **arguments)
    except Exception as error:  # timm and the client of the Hub raise many types
        reason = f"{first_line(error)}{unavailable_reason()}"
        raise UserError(f"{name}: its pretrained weights cannot be loaded: {reason}") from error
    config: Any = module.pretrained_cfg
    model_args = {key: value for key, value in getattr(module, "_model_args", {}).items() if key != "num_classes"}
    preprocessing = resolve_data_config(model=module)
    return Encoder(module, preprocessing, name, config["architecture"], model_args, revision=revision)
