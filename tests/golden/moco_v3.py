"""Naive training loop of MoCo v3 and a plain LARS optimizer.

Conventions: state dicts have the prefixes ``backbone.``, ``projector.`` and, for the student only,
``predictor.``. All modules run in train mode. Ranks are emulated as with SyncBN: the global batch goes
through in one piece.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .formulas import moco_v3_loss
from .moco_v1v2 import move_teacher

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class MocoV3Run:
    """What a run leaves behind.

    Attributes:
        losses: Loss of every step, before its update, averaged over the ranks.
        student: Final state dict of backbone, projector and predictor.
        teacher: Final state dict of backbone and projector.
    """

    losses: list[float]
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]


class NaiveLars(Optimizer):
    """LARS of MoCo v3: trust ratio and weight decay for ndim > 1 only, lr applied after the momentum."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, wd: float, momentum: float = 0.9, eta: float = 1e-3
    ) -> None:
        """Stores the settings.

        Args:
            params: Parameters to train.
            lr: Learning rate.
            wd: Weight decay.
            momentum: Momentum of the buffer.
            eta: Trust coefficient.
        """
        super().__init__(list(params), {"lr": lr, "wd": wd, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad.clone()
                if p.ndim > 1:
                    g += group["wd"] * p
                    if p.norm() > 0 and g.norm() > 0:
                        g *= group["eta"] * p.norm() / g.norm()
                state = self.state[p]
                state["mu"] = group["momentum"] * state["mu"] + g if "mu" in state else g
                p.sub_(group["lr"] * state["mu"])


def train_moco_v3(
    backbone: nn.Module,
    projector: nn.Module,
    predictor: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    temperature: float,
    optimizer_factory: OptimizerFactory,
    lrs: Sequence[float],
    teacher_momenta: Sequence[float],
    world_size: int = 1,
) -> MocoV3Run:
    """Trains with the symmetric loss; the teacher moves after each optimizer update.

    Step t: q1 then q2 in two separate student forwards, k1 then k2 with the teacher, loss, optimizer at
    lrs[t], teacher move with teacher_momenta[t]. Frozen parameters stay frozen, are kept from the optimizer,
    and take part in the teacher move, which changes them by rounding only. The official program moves the
    teacher between the q and the k forwards: the momentum of its step t + 1 plays the part of
    teacher_momenta[t] here, and its move at step 0 is a no-op up to rounding.

    Args:
        backbone: Trunk; copied, as are the other modules.
        projector: Projector.
        predictor: Predictor, student only.
        batches: For every step the global batch of view 1 and of view 2, rows in rank order.
        temperature: Softmax temperature.
        optimizer_factory: Builds the optimizer from the trainable student parameters, in module order.
        lrs: Learning rate of every step.
        teacher_momenta: EMA momentum of every step.
        world_size: Number of emulated ranks; each takes an equal contiguous part of the queries against all
            keys, and the losses are averaged over the ranks.

    Returns losses and final state; raises ValueError if a batch does not divide into the ranks.
    """
    base = nn.ModuleDict({"backbone": copy.deepcopy(backbone), "projector": copy.deepcopy(projector)}).train()
    predict = copy.deepcopy(predictor).train()
    teacher = copy.deepcopy(base).requires_grad_(False)
    student = nn.ModuleDict({**base, "predictor": predict})
    optimizer = optimizer_factory([p for p in student.parameters() if p.requires_grad])
    losses = []
    for (x1, x2), lr, m in zip(batches, lrs, teacher_momenta, strict=True):
        n_local, rest = divmod(x1.shape[0], world_size)
        if rest:
            raise ValueError(f"batch {x1.shape[0]} does not divide into {world_size} ranks")
        q1, q2 = (predict(base["projector"](base["backbone"](x))) for x in (x1, x2))
        with torch.no_grad():
            k1, k2 = (teacher["projector"](teacher["backbone"](x)) for x in (x1, x2))
        rank_losses = []
        for rank in range(world_size):
            rows = slice(rank * n_local, (rank + 1) * n_local)
            rank_losses.append(moco_v3_loss(q1[rows], k2, q2[rows], k1, temperature, rank, world_size))
        loss = torch.stack(rank_losses).mean()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        move_teacher(teacher, base, m)
        losses.append(loss.item())
    return MocoV3Run(losses, dict(student.state_dict()), dict(teacher.state_dict()))
