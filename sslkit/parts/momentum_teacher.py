"""The momentum teacher: a frozen copy of a module that follows its student slowly."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sslkit.distributed.sharding import own_part
from sslkit.parts.batchnorm import GlobalBatchNorm
from sslkit.parts.schedules import Progress


class MomentumTeacher(nn.Module):
    """A copy of a module that receives no gradient and follows its student as an exponential moving average.

    MoCo (He et al., 2020, arXiv:1911.05722, eq. 2): ``theta_k = m * theta_k + (1 - m) * theta_q``.

    Only **parameters** are averaged. BatchNorm's running statistics are the teacher's own: its forward passes in
    training mode collect them, as in the papers' code.

    Dropout and stochastic depth (timm's ``drop_rate``, ``drop_path_rate`` and similar) are off in the teacher, so that
    one view always has one key. The official code of MoCo and BYOL has neither; DINO's builds its teacher with
    ``drop_path_rate = 0``. So in training mode every layer but BatchNorm is in eval mode.

    Attributes:
        module: The copy; what is exported where the teacher is published.

    Args:
        student: Module to copy. The copy starts equal to it, buffers included.
        momentum: Weight of the teacher's own value in every move, in [0, 1]: a number, or a function of the position in
            training such as `sslkit.methods.MomentumOptions.momentum_at`. 1 is a frozen teacher, as for distillation.
    """

    def __init__(self, student: nn.Module, momentum: float | Callable[[Progress], float] = 1.0) -> None:
        super().__init__()
        self.momentum = momentum
        self.module = copy.deepcopy(student)
        self.module.requires_grad_(False)
        self.train(student.training)

    def momentum_at(self, progress: Progress) -> float:
        """The momentum at a position in training."""
        return self.momentum(progress) if callable(self.momentum) else self.momentum

    def train(self, mode: bool = True) -> "MomentumTeacher":
        """Set the mode. In training mode only BatchNorm trains: it normalises by the batch's own statistics."""
        super().train(mode)
        for layer in self.module.modules():
            layer.training = mode and isinstance(layer, (_NormBase, GlobalBatchNorm))
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the copied module without recording a graph."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Move every parameter towards the student's, in place; of those in parts, each process its own.

        Args:
            student: The module this teacher was copied from, with its current parameters.
            momentum: Weight of the teacher's own value, in [0, 1]. 1 leaves the teacher bit-identical; 0 copies.
        """
        own: list[Tensor] = [own_part(param) for param in self.module.parameters()]
        theirs: list[Tensor] = [own_part(param) for param in student.parameters()]
        torch._foreach_lerp_(own, theirs, 1.0 - momentum)
