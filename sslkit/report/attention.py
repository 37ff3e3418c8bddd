"""Where a ViT's class token looks: the attention of the last block, for a few images."""

import copy
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image
from timm.utils import AttentionExtract
from torch import Tensor, nn

from sslkit.errors import UserError
from sslkit.evaluate.features.encoder import Encoder
from sslkit.report.sample import Sample
from sslkit.report.thumbnails import data_uri

NUM_IMAGES, MAX_HEADS, SIDE = 6, 6, 112
COLOURS = "inferno"


@dataclass(frozen=True)
class AttentionRow:
    """An image and its attention maps, as ``data:`` addresses: the mean over heads, then some heads."""

    image: str
    mean: str
    heads: list[str]


def last_attention(module: nn.Module, images: Tensor) -> Tensor:
    """How much the class token of the last block attends to each patch: (B, heads, rows, columns).

    Rows of the attention matrix sum to one over all tokens, the class token's own included; that part is left out.
    The module is not changed.

    Args:
        module: A timm vision transformer with a class token.
        images: (B, 3, H, W), normalised.

    Raises:
        UserError: Not such a model.
    """
    model: Any = copy.deepcopy(module)
    blocks = getattr(model, "blocks", None)
    grid = getattr(getattr(model, "patch_embed", None), "dynamic_feat_size", None)
    if getattr(model, "cls_token", None) is None or grid is None or not blocks:
        raise UserError("attention maps need a ViT with a class token")
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False  # a fused kernel never holds the matrix
    name = f"blocks.{len(blocks) - 1}.attn.attn_drop"
    if name not in dict(model.named_modules()):
        raise UserError("attention maps need blocks whose attention timm can lay open")
    with torch.inference_mode():
        weights: Tensor = AttentionExtract(model, names=[name], method="hook")(images)[name]
    rows, columns = grid(tuple(images.shape[-2:]))
    patches: Tensor = weights[:, :, 0, -rows * columns :].unflatten(-1, (rows, columns))
    return patches


def draw_attention(encoder: Encoder, sample: Sample) -> list[AttentionRow]:
    """Attention maps of the first few queries, each map on its own scale from dark to bright.

    Raises:
        UserError: Not a ViT with a class token, or not one of RGB.
    """
    count = min(NUM_IMAGES, len(sample.queries))
    shown = np.linspace(0, len(sample.queries) - 1, count, dtype=int).tolist()
    if encoder.channels != 3:
        raise UserError(f"attention is drawn for encoders of RGB, not of {encoder.channels} channels")
    transform = encoder.transform()
    module = encoder.module.eval().cpu()
    inputs = torch.stack([transform(Image.fromarray(sample.queries.read(index))) for index in shown])
    maps = last_attention(module, inputs).float().cpu()
    rows = []
    for image, heads in zip(inputs, maps, strict=True):
        each = [_colour(head) for head in heads[:MAX_HEADS]]
        rows.append(AttentionRow(_seen(encoder, image), _colour(heads.mean(dim=0)), each if len(heads) > 1 else []))
    return rows


def _seen(encoder: Encoder, image: Tensor) -> str:
    """The picture as the encoder saw it: cropped, in pixels again."""
    mean, std = (torch.tensor(encoder.preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return data_uri(np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)), SIDE)


def _colour(attention: Tensor) -> str:
    low, high = attention.min(), attention.max()
    scaled = ((attention - low) / (high - low).clamp_min(1e-12)).numpy()
    pixels = (mpl.colormaps[COLOURS](scaled)[..., :3] * 255).astype(np.uint8)
    return data_uri(np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)), SIDE)
