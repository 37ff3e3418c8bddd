"""Attention of a ViT's class token in the last block, for a few images."""

import copy
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.utils import AttentionExtract
from torch import Tensor, nn

from sslkit.errors import UserError
from sslkit.evaluate.features.encoder import Encoder
from sslkit.report.gallery.gallery_images import GalleryImages
from sslkit.report.gallery.thumbnails import data_uri

NUM_IMAGES, MAX_HEADS, SIDE = 6, 6, 112
COLOUR_MAP = "inferno"


@dataclass(frozen=True)
class AttentionRow:
    """An image and its attention maps as ``data:`` URIs: the mean over heads, then the first heads."""

    image: str
    mean: str
    heads: list[str]


def last_attention(module: nn.Module, images: Tensor) -> Tensor:
    """Attention of the class token to each patch in the last block, (B, heads, rows, columns).

    Its attention to itself is left out, so the weights of a map sum to less than 1. The module is not changed. Raises
    `UserError` if it is not a timm vision transformer with a class token.
    """
    model: Any = copy.deepcopy(module)
    blocks = getattr(model, "blocks", None)
    grid = getattr(getattr(model, "patch_embed", None), "dynamic_feat_size", None)
    if getattr(model, "cls_token", None) is None or grid is None or not blocks:
        raise UserError("attention maps need a ViT with a class token")
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False  # a fused kernel does not compute the attention matrix
    name = f"blocks.{len(blocks) - 1}.attn.attn_drop"
    if name not in dict(model.named_modules()):
        raise UserError("attention maps need blocks with a module attn.attn_drop")
    with torch.inference_mode():
        weights: Tensor = AttentionExtract(model, names=[name], method="hook")(images)[name]
    rows, columns = grid(tuple(images.shape[-2:]))
    patches: Tensor = weights[:, :, 0, -rows * columns :].unflatten(-1, (rows, columns))
    return patches


def draw_attention(encoder: Encoder, images: GalleryImages) -> list[AttentionRow]:
    """Attention maps of a few query images, each scaled from its lowest to its highest weight.

    Raises `UserError` if the encoder is not a ViT with a class token for RGB images.
    """
    if encoder.channels != 3:
        raise UserError(f"attention maps need an encoder for RGB images, not for {encoder.channels} channels")
    count = min(NUM_IMAGES, len(images.queries))
    indices = np.linspace(0, len(images.queries) - 1, count, dtype=int).tolist()
    transform = encoder.transform()
    inputs = torch.stack([transform(Image.fromarray(images.queries.read(index))) for index in indices])
    attention = last_attention(encoder.module.eval().cpu(), inputs).float()
    mean, std = (torch.tensor(encoder.preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = ((inputs * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    rows = []
    for image, heads in zip(pixels, attention, strict=True):
        each = [_draw_map(head) for head in heads[:MAX_HEADS]] if len(heads) > 1 else []
        rows.append(AttentionRow(_resized(image, Image.Resampling.BILINEAR), _draw_map(heads.mean(dim=0)), each))
    return rows


def _draw_map(attention: Tensor) -> str:
    low, high = attention.min(), attention.max()
    scaled = ((attention - low) / (high - low).clamp_min(1e-12)).numpy()
    pixels = (mpl.colormaps[COLOUR_MAP](scaled)[..., :3] * 255).astype(np.uint8)
    return _resized(pixels, Image.Resampling.NEAREST)


def _resized(pixels: NDArray[np.uint8], resampling: Image.Resampling) -> str:
    return data_uri(np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), resampling)), SIDE)
