"""Any timm model as a feature extractor, with MoCo v3's changes to ViTs, through timm's public names."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn

from sslkit.errors import UserError, first_line, near_miss
from sslkit.hub.availability import quiet_hub
from sslkit.hub.meta_build import Shapes
from sslkit.hub.revisions import is_hub_name, resolve_hub_encoder
from sslkit.hub.untrusted import check_model, check_model_args, check_size, read_encoder_config, tensor_shapes

Family = Literal["resnet", "vit", "other"]

MAX_CHANNELS = 512  # the bound of [data] channels too
PRETRAINED_SOURCES = ("hf_hub:", "hf-hub:", "local-dir:")
RESERVED_ARGS = {
    *("num_classes", "features_only", "pretrained", "pretrained_cfg", "checkpoint_path", "scriptable"),
}


class BackboneConfig(BaseModel):
    """What to build: the ``[backbone]`` table of a recipe.

    Attributes:
        name: Any timm model name.
        pretrained: False, True (timm's own weights), ``"hf_hub:user/repo"``, or ``"local-dir:PATH"``.
        img_size: Side of the square input in pixels, where timm builds a model for one size. 0: that of the views.
        args: Passed to timm as they are (``num_heads``, ``drop_path_rate`` ...). Must be plain data.
        zero_init_last: Zero the last BatchNorm of each residual block of a ResNet (None: timm's default).
        init: ``"moco_v3"`` for the ViT initialisation of arXiv:2104.02057, else timm's.
        pos_embed: ``"sincos2d"`` for MoCo v3's fixed position embedding, ``"none"`` for none (its ablation), else
            timm's learned one.
        freeze_patch_embed: Stop the gradient at the patch projection (MoCo v3, section 4.2).
        small_stem: ResNets for 32-pixel images: a 3 x 3 convolution of stride 1, and no max-pooling.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    pretrained: bool | str = False
    img_size: int = Field(strict=True, default=0, ge=0)
    args: dict[str, Any] = Field(default_factory=dict)
    zero_init_last: bool | None = None
    init: Literal["timm", "moco_v3"] = "timm"
    pos_embed: Literal["timm", "sincos2d", "none"] = "timm"
    freeze_patch_embed: bool = False
    small_stem: bool = False

    @property
    def channels(self) -> int:
        """Number of channels of the images that the model takes."""
        return int(self.args.get("in_chans", 3))

    @field_validator("args")
    @classmethod
    def _check_channels(cls, value: dict[str, Any]) -> dict[str, Any]:
        channels = value.get("in_chans", 3)
        if type(channels) is not int or not 1 <= channels <= MAX_CHANNELS:
            raise ValueError(f"in_chans must be a whole number from 1 to {MAX_CHANNELS}")
        return value

    @model_validator(mode="after")
    def _check_pretrained(self) -> "BackboneConfig":
        if isinstance(self.pretrained, str) and not self.pretrained.startswith(PRETRAINED_SOURCES):
            raise ValueError(
                f"pretrained: must be true, false, 'hf_hub:user/name' or 'local-dir:PATH', not {self.pretrained!r}"
            )
        return self


def check_name(name: str) -> None:
    """Raise `UserError` unless ``name`` is a timm model name."""
    if not timm.is_model(name):
        raise UserError(f"[backbone] name: timm has no model {name!r}{model_hint(name)}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise UserError(f"[backbone] name: timm has no weights {name!r}{near_miss(name, known)}") from error


def model_hint(name: str) -> str:
    """`near_miss` among timm's models; for a name with a tag, such as ``resnet5O.a1_in1k``, among its weights."""
    return near_miss(name, timm.list_pretrained() if "." in name else timm.list_models())


def family(name: str) -> Family:
    """Which of a paper's recipes fits the model: that for ResNets, that for plain ViTs, or neither."""
    if timm.models.is_model_in_modules(name, ("resnet",)):
        return "resnet"
    if timm.models.is_model_in_modules(name, ("vision_transformer", "deit")):
        return "vit"
    return "other"


def create_backbone(config: BackboneConfig) -> nn.Module:
    """Build the model that ``config`` asks for: (B, C, H, W) -> pooled features (B, D).

    C is 3, or ``in_chans`` of the config's arguments.

    Raises:
        UserError: Unknown name, arguments the model refuses, or an image size it cannot take.
    """
    check_name(config.name)
    model = _create_timm_model(config)
    if config.small_stem:
        replace_stem_for_small_images(model, config)
    if config.init == "moco_v3":
        initialise_vit(model)
    if config.pos_embed == "sincos2d":
        fix_sincos_position_embedding(model, config.name)
    if config.freeze_patch_embed:
        freeze_patch_projection(model, config.name)
    return model


def patch_size(model: nn.Module) -> int:
    """Side of the patches that a model cuts its images into, in pixels; 1 if it needs no whole number of them."""
    embed: Any = getattr(model, "patch_embed", None)
    size = getattr(embed, "patch_size", 1)
    if getattr(embed, "dynamic_img_pad", False):
        return 1
    return max(size) if isinstance(size, tuple | list) else int(size)


def whole_patches(size: int, patch: int) -> int:
    """The multiple of ``patch``, at least one patch, nearest to an image size; both in pixels."""
    return max(round(size / patch), 1) * patch


def feature_dim(model: nn.Module, img_size: int, key: str = "size", channels: int = 3) -> int:
    """Width D of the pooled features, found by one forward pass in eval mode on a blank image.

    Args:
        model: From `create_backbone`.
        img_size: Side of the image in pixels.
        key: Which key of ``[views]`` an error names.
        channels: Of the image.

    Raises:
        UserError: The model refuses images of this size.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            features = model(torch.zeros(1, channels, img_size, img_size))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise UserError(
            f"[views] {key}: the backbone cannot take images of {img_size} x {img_size} pixels ({first_line(error)})"
        ) from error
    finally:
        model.train(was_training)
    if features.ndim != 2 or 0 in features.shape:
        raise UserError(
            f"[backbone] args: the model returns features of shape {tuple(features.shape)[1:]} for one image of "
            f"{img_size} pixels; it must pool them to one vector (leave global_pool at its default)"
        )
    return int(features.shape[1])


def _create_timm_model(config: BackboneConfig) -> nn.Module:
    reserved = sorted(RESERVED_ARGS & config.args.keys())
    if reserved:
        raise UserError(f"[backbone] args: {reserved[0]!r} is sslkit's to set; leave it out")
    check_model_args(config.args, "[backbone] args")
    if isinstance(config.pretrained, str) and config.pretrained.startswith("local-dir:"):
        folder = Path(config.pretrained.removeprefix("local-dir:"))
        check_model(read_encoder_config(folder), tensor_shapes(folder / "model.safetensors"), config.pretrained)
    kwargs = _timm_args(config)
    named = config.pretrained if isinstance(config.pretrained, str) else config.name
    source = _pinned(named)
    try:
        with quiet_hub() if config.pretrained and not source.startswith("local-dir:") else nullcontext():
            model: nn.Module = timm.create_model(source, pretrained=bool(config.pretrained), **kwargs)
    except OSError as error:
        raise UserError(f"[backbone] pretrained: no weights for {named!r} to be had: {first_line(error)}") from error
    except Exception as error:  # models raise any exception on wrong arguments or an untrusted repository
        raise UserError(
            f"[backbone] timm cannot build {named!r} for {config.img_size}-pixel images with args {config.args}: "
            f"{first_line(error)}"
        ) from error
    built: Any = model.pretrained_cfg
    if isinstance(config.pretrained, str) and built["architecture"] != config.name.split(".")[0]:
        raise UserError(
            f"[backbone] name: {config.name!r}, but {named!r} holds a {built['architecture']!r}; name that instead"
        )
    channels = (built.get("input_size") or (3,))[0]
    if isinstance(config.pretrained, str) and config.channels == 3 != channels:
        raise UserError(
            f"[backbone] args: {named!r} takes images of {channels} channels; add args = {{ in_chans = {channels} }}"
        )
    return model


def check_backbone_size(config: BackboneConfig, shapes: Shapes, where: str) -> None:
    """Check that a backbone is no larger than weights of these shapes, before memory is allocated for it.

    Raises:
        UserError: It is larger, or timm cannot build it. The message starts with ``where``.
    """
    check_model_args(config.args, where)
    check_size(config.name, _timm_args(config), shapes, where)


def _timm_args(config: BackboneConfig) -> dict[str, Any]:
    args: dict[str, Any] = {"num_classes": 0, **config.args}
    if config.zero_init_last is not None:
        args.setdefault("zero_init_last", config.zero_init_last)
    if takes_image_size(config.name) and config.img_size:
        args.setdefault("img_size", config.img_size)
    if config.pos_embed == "none":
        args["pos_embed"] = "none"
    return args


def _pinned(name: str) -> str:
    """The source that timm loads; for a name on the Hub, with its revision."""
    if not is_hub_name(name):
        return name
    try:
        with quiet_hub():
            return resolve_hub_encoder(name).source
    except UserError as error:
        raise UserError(f"[backbone] pretrained: {error}") from error


def takes_image_size(name: str) -> bool:
    """Whether timm builds the model for one input size, which it must be given (ViT, Swin; not ResNet)."""
    config = timm.get_pretrained_cfg(name)
    return family(name) == "vit" or bool(config is not None and config.fixed_input_size)


def fresh_tensors(config: BackboneConfig, model: nn.Module) -> list[str]:
    """Names of the tensors of a pretrained backbone that `create_backbone` did not take from the weights."""
    fresh = {"conv1.weight"} if config.small_stem else set()
    if config.init == "moco_v3":
        linear = (name for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
        fresh |= {f"{name}.{kind}" for name in (*linear, "patch_embed.proj") for kind in ("weight", "bias")}
        fresh.add("cls_token")
    if config.pos_embed == "sincos2d":
        fresh.add("pos_embed")
    return [name for name in model.state_dict() if name in fresh]


def weights_file(config: BackboneConfig) -> Path | None:
    """The file of ``pretrained`` weights that are in a folder or on the Hub."""
    if not isinstance(config.pretrained, str):
        return None
    if config.pretrained.startswith("local-dir:"):
        return Path(config.pretrained.removeprefix("local-dir:")) / "model.safetensors"
    with quiet_hub():
        return resolve_hub_encoder(config.pretrained).folder / "model.safetensors"


def replace_stem_for_small_images(model: nn.Module, config: BackboneConfig) -> None:
    """Give a timm ResNet the stem of the MoCo authors' CIFAR-10 notebook: 3 x 3, stride 1, no max-pooling.

    timm has no argument for it, so only sslkit can rebuild such an encoder, not timm alone.
    """
    conv1 = getattr(model, "conv1", None)
    if family(config.name) != "resnet" or not isinstance(conv1, nn.Conv2d):
        raise UserError(f"[backbone] small_stem: only ResNets with a plain first convolution, not {config.name!r}")
    small = nn.Conv2d(conv1.in_channels, conv1.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = small
    model.maxpool = nn.Identity()


def initialise_vit(model: nn.Module) -> None:
    """MoCo v3's ViT initialisation: Xavier-uniform layers, q, k and v each as a matrix of its own."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            out_width = layer.out_features // 3 if name.endswith("qkv") else layer.out_features
            _uniform(layer.weight, fan_sum=out_width + layer.in_features)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    patch_projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    if isinstance(patch_projection, nn.Conv2d):
        fan_in = patch_projection.weight[0].numel()
        _uniform(patch_projection.weight, fan_sum=fan_in + patch_projection.out_channels)
        if patch_projection.bias is not None:
            nn.init.zeros_(patch_projection.bias)
    class_token = getattr(model, "cls_token", None)
    if isinstance(class_token, nn.Parameter):
        nn.init.normal_(class_token, std=1e-6)


def _uniform(weight: Tensor, fan_sum: int) -> None:
    bound = math.sqrt(6.0 / fan_sum)
    nn.init.uniform_(weight, -bound, bound)


def fix_sincos_position_embedding(model: nn.Module, name: str) -> None:
    """Set the fixed 2-D sine-cosine position embedding (rows of prefix tokens zero) and stop its gradient."""
    pos_embed = getattr(model, "pos_embed", None)
    patch_embed = getattr(model, "patch_embed", None)
    if not isinstance(pos_embed, nn.Parameter) or pos_embed.ndim != 3 or patch_embed is None:
        raise UserError(f"[backbone] pos_embed: {name!r} has no absolute position embedding to replace; use 'timm'")
    grid, width = list(patch_embed.grid_size), pos_embed.shape[2]
    if width % 4:
        raise UserError(f"[backbone] pos_embed: 'sincos2d' needs a width divisible by 4, {name!r} has {width}")
    patches = build_sincos2d_pos_embed(grid, width, temperature=10000.0, interleave_sin_cos=True)
    with torch.no_grad():
        pos_embed.zero_()
        pos_embed[0, pos_embed.shape[1] - len(patches) :] = patches
    pos_embed.requires_grad_(False)


def freeze_patch_projection(model: nn.Module, name: str) -> None:
    """Stop the gradient at the patch projection, which stabilises MoCo v3 (section 4.2)."""
    projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(projection, nn.Conv2d):
        raise UserError(f"[backbone] freeze_patch_embed: {name!r} has no single patch projection; set it to false")
    projection.requires_grad_(False)


def recompute_activations(model: nn.Module, name: str) -> None:
    """Turn on timm's activation checkpointing: fewer activations are kept, and computed again in the backward pass."""
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"[train] activation_checkpointing: timm has no such switch for {name!r}") from error


def recomputes(model: nn.Module) -> bool:
    """Whether `recompute_activations` was called. Batch statistics are then collected twice a step."""
    return bool(getattr(model, "grad_checkpointing", False))
