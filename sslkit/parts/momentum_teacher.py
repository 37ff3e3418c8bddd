"""The momentum teacher: a copy of a module that follows its student as a moving average."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sslkit.distributed.sharding import local_shard
from sslkit.parts.batchnorm import GlobalBatchNorm
from sslkit.parts.schedules import Progress
from sslkit.parts.update_gate import current_gate


class MomentumTeacher(nn.Module):
    """A copy of a module that receives no gradient and follows its student as an exponential moving average.

    MoCo (He et al., 2020, arXiv:1911.05722, eq. 2): ``theta_k = m * theta_k + (1 - m) * theta_q``.

    Only **parameters** are averaged. BatchNorm's running statistics are the teacher's own: its forward passes in
    training mode collect them, as in the papers' code.

    Attributes:
        module: The copy; what is exported where the teacher is published.

    Args:
        student: Module to copy. The copy starts equal to it, buffers included.
        momentum: Weight of the teacher's own value in every update, in [0, 1]: a number, or a function of the position
            in training such as `sslkit.methods.MomentumOptions.momentum_at`. 1 is a frozen teacher, for distillation.
        batch_statistics: Whether BatchNorm is in training mode while training, as in the papers. False: it normalises
            by its running statistics, which then stay as copied.
        dropout: Whether dropout and stochastic depth (timm's ``drop_rate``, ``drop_path_rate`` and similar) are on
            while training. Off, one view always has one key: the official code of MoCo and BYOL has neither, and DINO's
            builds its teacher with ``drop_path_rate = 0``.
    """

    def __init__(
        self,
        student: nn.Module,
        momentum: float | Callable[[Progress], float] = 1.0,
        *,
        batch_statistics: bool = True,
        dropout: bool = False,
    ) -> None:
        super().__init__()
        self.momentum = momentum
        self.batch_statistics, self.dropout = batch_statistics, dropout
        self.module = copy.deepcopy(student)
        self.module.requires_grad_(False)
        self.train(student.training)

    def momentum_at(self, progress: Progress) -> float:
        """The momentum at a position in training."""
        return self.momentum(progress) if callable(self.momentum) else self.momentum

    def train(self, mode: bool = True) -> "MomentumTeacher":
        """Set the mode: of BatchNorm as ``batch_statistics`` says, of all other layers as ``dropout`` says."""
        super().train(mode)
        for layer in self.module.modules():
            normalises = isinstance(layer, (_NormBase, GlobalBatchNorm))
            layer.training = mode and (self.batch_statistics if normalises else self.dropout)
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the copy without recording a graph."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Move every parameter towards the student's, in place. Of sharded parameters each process moves its shard.

        Args:
            student: The module this teacher was copied from, with its current parameters.
            momentum: Weight of the teacher's own value, in [0, 1]. 1 leaves every bit as it is; 0 copies.
        """
        own: list[Tensor] = [local_shard(param) for param in self.module.parameters()]
        theirs: list[Tensor] = [local_shard(param) for param in student.parameters()]
        gate = current_gate()
        if gate is None:
            torch._foreach_lerp_(own, theirs, 1.0 - momentum)
            return
        moves = torch._foreach_sub(theirs, own)
        torch._foreach_mul_(moves, (1.0 - momentum) * gate)
        torch._foreach_add_(own, moves)
