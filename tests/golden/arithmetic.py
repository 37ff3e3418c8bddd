"""Parameter counts and initialisation bounds, derived by hand from the layer lists of the papers."""

from __future__ import annotations

import math

R50_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))


def linear_count(n_in: int, n_out: int, bias: bool) -> int:
    """Parameters of a linear layer.

    Args:
        n_in: Input width.
        n_out: Output width.
        bias: Whether there is a bias.

    Returns:
        The number of parameters.
    """
    return n_in * n_out + (n_out if bias else 0)


def head_parameter_counts() -> dict[str, int]:
    """Parameters of every head of section 0, summed layer by layer (SwAV includes its 3000 prototypes).

    Returns:
        Head name to number of parameters.
    """
    bn_hidden = 2 * 4096
    v3_out = linear_count(4096, 256, False)
    v3_pred = linear_count(256, 4096, False) + bn_hidden + v3_out
    vit_tail = bn_hidden + linear_count(4096, 4096, False) + bn_hidden + v3_out
    return {
        "v1": linear_count(2048, 128, True),
        "v2": linear_count(2048, 2048, True) + linear_count(2048, 128, True),
        "v3_r50_projector": linear_count(2048, 4096, False) + bn_hidden + v3_out,
        "v3_vit_s_projector": linear_count(384, 4096, False) + vit_tail,
        "v3_vit_b_projector": linear_count(768, 4096, False) + vit_tail,
        "v3_r50_predictor": v3_pred,
        "v3_vit_predictor": v3_pred,
        "byol_projector": linear_count(2048, 4096, True) + bn_hidden + v3_out,
        "byol_predictor": linear_count(256, 4096, True) + bn_hidden + v3_out,
        "swav": (
            linear_count(2048, 2048, True) + 2 * 2048 + linear_count(2048, 128, True) + linear_count(128, 3000, False)
        ),
    }


def vit_trunk_count(dim: int, trainable_only: bool = False) -> int:
    """Parameters of a 12-block ViT/16 trunk at 224 pixels, without a head.

    Args:
        dim: Embedding width.
        trainable_only: Leave out the position table and the patch projection, which MoCo v3 freezes.

    Returns:
        The number of parameters.
    """
    tokens = 1 + 14 * 14
    norm = 2 * dim
    attention = linear_count(dim, 3 * dim, True) + linear_count(dim, dim, True)
    mlp = linear_count(dim, 4 * dim, True) + linear_count(4 * dim, dim, True)
    trainable = dim + 12 * (2 * norm + attention + mlp) + norm
    frozen = tokens * dim + linear_count(3 * 16 * 16, dim, True)
    return trainable if trainable_only else trainable + frozen


def resnet50_trunk_count() -> int:
    """Parameters of a ResNet-50 without its classifier, summed block by block.

    Returns:
        The number of parameters.
    """
    total = 3 * 64 * 49 + 2 * 64
    width_in = 64
    for width, blocks in R50_STAGES:
        width_out = 4 * width
        total += width_in * width_out + 2 * width_out
        for _ in range(blocks):
            total += width_in * width + 9 * width * width + width * width_out
            total += 2 * width + 2 * width + 2 * width_out
            width_in = width_out
    return total


def xavier_bound(fan_in: int, fan_out: int) -> float:
    """Half-width of the Xavier uniform distribution, used by the ViT linears other than qkv.

    Args:
        fan_in: Input width.
        fan_out: Output width.

    Returns:
        The bound sqrt(6 / (fan_in + fan_out)).
    """
    return math.sqrt(6.0 / (fan_in + fan_out))


def vit_init_bounds(dim: int, patch: int = 16, channels: int = 3, mlp_ratio: int = 4) -> dict[str, float]:
    """Half-widths of the uniform weight distributions of the MoCo v3 ViT.

    The three blocks of the fused qkv weight count as separate dim x dim matrices.

    Args:
        dim: Embedding width (384 for S, 768 for B).
        patch: Patch size.
        channels: Image channels.
        mlp_ratio: Hidden width of the MLP over dim.

    Returns:
        Bounds under the names "qkv", "proj", "fc1", "fc2" and "patch_embed".
    """
    return {
        "qkv": xavier_bound(dim, dim),
        "proj": xavier_bound(dim, dim),
        "fc1": xavier_bound(dim, mlp_ratio * dim),
        "fc2": xavier_bound(mlp_ratio * dim, dim),
        "patch_embed": xavier_bound(channels * patch * patch, dim),
    }


def head_linear_bound(fan_in: int) -> float:
    """Half-width of PyTorch's default uniform weight distribution of a linear layer, kept by all heads.

    Args:
        fan_in: Input width.

    Returns:
        The bound 1 / sqrt(fan_in).
    """
    return 1.0 / math.sqrt(fan_in)


def head_linear_std(fan_in: int) -> float:
    """Standard deviation of the head weights: bound / sqrt(3).

    Args:
        fan_in: Input width.

    Returns:
        The standard deviation 1 / sqrt(3 fan_in).
    """
    return head_linear_bound(fan_in) / math.sqrt(3.0)
