"""Heads of MoCo v1, v2 and v3 spelled out layer by layer.

Official state-dict names are the names below with a prefix: ``fc.`` for the MoCo v1/v2 heads and the ResNet
projector of v3, ``head.`` for the ViT projector, ``predictor.`` for both predictors. The v1 head is a bare
Linear (``fc.weight``, ``fc.bias``).
"""

from __future__ import annotations

from torch import nn

HIDDEN = 4096
OUT = 256


def v1_head(features: int = 2048, out: int = 128) -> nn.Linear:
    """MoCo v1 projector: names ``weight``, ``bias``.

    Args:
        features: Width of the trunk.
        out: Embedding width.

    Returns:
        A linear layer with bias.
    """
    return nn.Linear(features, out)


def v2_head(features: int = 2048, out: int = 128) -> nn.Sequential:
    """MoCo v2 projector without BN: names ``0.*``, ``2.*``.

    Args:
        features: Width of the trunk and of the hidden layer.
        out: Embedding width.

    Returns:
        Linear, ReLU, Linear, both with bias.
    """
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, out))


def v3_r50_projector(features: int = 2048, hidden: int = HIDDEN, out: int = OUT) -> nn.Sequential:
    """MoCo v3 ResNet projector: names ``0.weight``, ``1.*``, ``3.weight``, ``4.running_*``.

    Args:
        features: Width of the trunk.
        hidden: Hidden width.
        out: Embedding width.

    Returns:
        Two bias-free linear layers; the last BN has no affine parameters.
    """
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, out, bias=False),
        nn.BatchNorm1d(out, affine=False),
    )


def v3_vit_projector(features: int = 384, hidden: int = HIDDEN, out: int = OUT) -> nn.Sequential:
    """MoCo v3 ViT projector: ``0.weight``, ``1.*``, ``3.weight``, ``4.*``, ``6.weight``, ``7.running_*``.

    Args:
        features: Width of the trunk (384 for S, 768 for B).
        hidden: Hidden width.
        out: Embedding width.

    Returns:
        Three bias-free linear layers; the last BN has no affine parameters.
    """
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, out, bias=False),
        nn.BatchNorm1d(out, affine=False),
    )


def v3_r50_predictor(features: int = OUT, hidden: int = HIDDEN, out: int = OUT) -> nn.Sequential:
    """MoCo v3 ResNet predictor: names ``0.weight``, ``1.*``, ``3.weight``; no BN at the end.

    Args:
        features: Width of the projector's output.
        hidden: Hidden width.
        out: Embedding width.

    Returns:
        Two bias-free linear layers with BN and ReLU between.
    """
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, out, bias=False),
    )


def v3_vit_predictor(features: int = OUT, hidden: int = HIDDEN, out: int = OUT) -> nn.Sequential:
    """MoCo v3 ViT predictor: as for the ResNet, plus a BN without affine parameters (``4.running_*``).

    Args:
        features: Width of the projector's output.
        hidden: Hidden width.
        out: Embedding width.

    Returns:
        Two bias-free linear layers with BN and ReLU between and BN at the end.
    """
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, out, bias=False),
        nn.BatchNorm1d(out, affine=False),
    )
