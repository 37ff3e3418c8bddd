"""Naive BYOL: regression loss, heads, momentum schedule and the loop.

Conventions: state dicts have the prefixes ``backbone.``, ``projector.`` and, for the student only,
``predictor.``. The LARS of BYOL applies the learning rate after the momentum and is ``NaiveLars`` of
``moco_v3``. Ranks are emulated as one global batch, as with cross-replica BN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .common import OptimizerFactory, copied_student, gradient_step, state_of, trainable
from .formulas import l2_rows
from .moco_v1v2 import move_teacher


@dataclass(frozen=True)
class ByolRun:
    """What a run leaves behind.

    Attributes:
        losses: Loss of every step, before its update.
        student: Final state dict of backbone, projector and predictor.
        teacher: Final state dict of the target's backbone and projector.
    """

    losses: list[float]
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the normalised vectors, 2 - 2 cos, per sample.

    Args:
        prediction: Raw predictions, shape (N, d). Gradient flows here only.
        target: Raw projections of the teacher, shape (N, d).

    Returns:
        Float64 vector of shape (N,) with values in [0, 4].
    """
    p, z = l2_rows(prediction), l2_rows(target).detach()
    per_sample = []
    for i in range(p.shape[0]):
        difference = p[i] - z[i]
        per_sample.append((difference * difference).sum())
    return torch.stack(per_sample)


def byol_loss(p1: Tensor, z2: Tensor, p2: Tensor, z1: Tensor) -> Tensor:
    """Both directions summed, averaged over the batch.

    Args:
        p1: Raw predictions of view 1, shape (N, d).
        z2: Raw teacher projections of view 2, shape (N, d).
        p2: Raw predictions of view 2, shape (N, d).
        z1: Raw teacher projections of view 1, shape (N, d).

    Returns:
        Float64 scalar in [0, 8].
    """
    return (regression_loss(p1, z2) + regression_loss(p2, z1)).mean()


def byol_momentum(step: int, total_steps: int, initial: float) -> float:
    """Teacher momentum used after the update of a step: 1 - (1 - initial) (1 + cos(pi step / total)) / 2.

    Args:
        step: Zero-based step.
        total_steps: Number of steps of the run.
        initial: Momentum at step 0.

    Returns:
        The momentum.
    """
    return 1.0 - (1.0 - initial) * 0.5 * (1.0 + math.cos(math.pi * step / total_steps))


def byol_mlp(features: int, hidden: int = 4096, out: int = 256) -> nn.Sequential:
    """Linear with bias, BN, ReLU, Linear without bias: names ``0.*``, ``1.*``, ``3.weight``.

    Args:
        features: Input width.
        hidden: Hidden width.
        out: Output width.

    Returns:
        The head; there is no BN at the end.
    """
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, out, bias=False),
    )


def byol_projector(features: int = 2048, hidden: int = 4096, out: int = 256) -> nn.Sequential:
    """Projector on the trunk; see ``byol_mlp``.

    Args:
        features: Width of the trunk.
        hidden: Hidden width.
        out: Embedding width.

    Returns:
        The projector.
    """
    return byol_mlp(features, hidden, out)


def byol_predictor(features: int = 256, hidden: int = 4096) -> nn.Sequential:
    """Predictor, with outputs as wide as its inputs; see ``byol_mlp``.

    Args:
        features: Embedding width.
        hidden: Hidden width.

    Returns:
        The predictor.
    """
    return byol_mlp(features, hidden, features)


def train_byol(
    backbone: nn.Module,
    projector: nn.Module,
    predictor: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    optimizer_factory: OptimizerFactory,
    lrs: Sequence[float],
    teacher_momenta: Sequence[float],
    teacher_modules: tuple[nn.Module, nn.Module] | None = None,
) -> ByolRun:
    """Trains with the two-way regression loss; the teacher moves after each optimizer update.

    Step t: view 1 then view 2 through student and predictor in two separate forwards, the same through the
    teacher without gradient, loss, optimizer at lrs[t], teacher parameters moved with teacher_momenta[t]
    towards the student just updated. The teacher runs in train mode: its BN buffers follow its own forwards.

    Args:
        backbone: Trunk; copied, as are the other modules.
        projector: Projector.
        predictor: Predictor, student only.
        batches: For every step the global batch of view 1 and of view 2, shape (N, ...) each.
        optimizer_factory: Builds the optimizer from the trainable student parameters, in module order.
        lrs: Learning rate of every step.
        teacher_momenta: EMA momentum of every step, for example from ``byol_momentum``.
        teacher_modules: Initial backbone and projector of the teacher (the official program draws them
            separately); copies of the student's without.

    Returns:
        Losses and final state.
    """
    base = copied_student(backbone=backbone, projector=projector)
    own_backbone, own_projector = teacher_modules or (backbone, projector)
    teacher = copied_student(backbone=own_backbone, projector=own_projector).requires_grad_(False)
    student = nn.ModuleDict({**base, **copied_student(predictor=predictor)})
    optimizer = optimizer_factory(trainable(student))
    losses = []
    for (view1, view2), lr, momentum in zip(batches, lrs, teacher_momenta, strict=True):
        p1, p2 = (student["predictor"](base["projector"](base["backbone"](x))) for x in (view1, view2))
        with torch.no_grad():
            z1, z2 = (teacher["projector"](teacher["backbone"](x)) for x in (view1, view2))
        loss = byol_loss(p1, z2, p2, z1)
        gradient_step(optimizer, loss, lr)
        move_teacher(teacher, base, momentum)
        losses.append(loss.item())
    return ByolRun(losses, state_of(student), state_of(teacher))
