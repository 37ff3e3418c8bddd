"""The momentum teacher: a frozen copy of a module that follows its student slowly."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sslkit.distributed.sharding import own_part
from sslkit.parts.batchnorm import GlobalBatchNorm


class Teacher(nn.Module):
    """A copy of ``student`` that receives no gradient and moves only by exponential moving average.

    MoCo (He et al., 2020, arXiv:1911.05722, eq. 2): ``theta_k = m * theta_k + (1 - m) * theta_q``.

    Only **parameters** are averaged. BatchNorm running statistics are the teacher's own, collected by its own
    forward passes in training mode, as in the papers' code; they are never averaged.

    Dropout and stochastic depth (timm's ``drop_rate``, ``drop_path_rate`` and their kin) are off in the teacher,
    whatever the student has: the same view always has the same key. The official code of MoCo and BYOL has neither;
    DINO's builds its teacher with ``drop_path_rate = 0``. So in training mode everything but BatchNorm is in eval mode.

    Args:
        student: Module to copy. The copy starts equal to it, buffers included.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(student)
        self.module.requires_grad_(False)
        self.train(student.training)

    def train(self, mode: bool = True) -> "Teacher":
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
