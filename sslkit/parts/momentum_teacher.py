"""The momentum teacher: a copy of a module that follows its student as a moving average."""

import copy
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sslkit.distributed.sharding import local_shard
from sslkit.parts.batchnorm import GlobalBatchNorm
from sslkit.parts.schedules import Progress
from sslkit.parts.update_gate import current_gate

GRAIN = 32_768  # elements; PyTorch divides larger tensors among its threads


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

        Under `sslkit.parts.update_gate.gated` every bit may stay as it is.

        Args:
            student: The module this teacher was copied from, with its current parameters.
            momentum: Weight of the teacher's own value, in [0, 1]. 1 leaves every bit as it is; 0 copies.
        """
        own: list[Tensor] = [local_shard(param.detach()) for param in self.module.parameters()]
        theirs: list[Tensor] = [local_shard(param.detach()) for param in student.parameters()]
        gate = current_gate()
        if gate is not None and gate.device.type != "cpu":
            move_where(gate, own, theirs, 1.0 - momentum)
        elif gate is None or gate.item() == 1:
            move(own, theirs, 1.0 - momentum)


def move(own: list[Tensor], theirs: list[Tensor], weight: float) -> None:
    """``own.lerp_(theirs, weight)`` of every tensor.

    On a CPU each thread takes its share of all tensors: dividing one tensor after the other among the threads takes 4
    to 10 times as long if other processes, such as loader workers, need the cores. The bits do not depend on this.
    """
    threads = torch.get_num_threads()
    on_cpu = all(tensor.device.type == "cpu" for tensor in own)
    if not on_cpu or threads == 1 or all(tensor.numel() <= GRAIN for tensor in own):
        torch._foreach_lerp_(own, theirs, weight)
        return
    ours, others = _chunks(own, theirs)

    def take_share(index: int) -> None:
        if mine := ours[index::threads]:
            torch._foreach_lerp_(mine, others[index::threads], weight)

    pool = _threads(threads - 1, os.getpid())
    waiting = [pool.submit(take_share, index) for index in range(1, threads)]
    take_share(0)
    for each in waiting:
        each.result()


def move_where(gate: Tensor, own: list[Tensor], theirs: list[Tensor], weight: float) -> None:
    """`move` by a fused update, which does nothing where ``gate`` () is 0; the host does not wait for it."""
    torch._fused_sgd_(
        own,
        torch._foreach_sub(own, theirs),
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=weight,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=1.0 - gate,
    )


def _chunks(own: list[Tensor], theirs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Pairs of views of at most GRAIN elements, which no operator divides among threads."""
    chunks: tuple[list[Tensor], list[Tensor]] = ([], [])
    for pair in zip(own, theirs, strict=True):
        flat = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in pair if _is_dense(tensor)]
        alike = len(flat) == 2 and pair[0].stride() == pair[1].stride()
        for into, tensor in zip(chunks, flat if alike else pair, strict=True):
            into.extend(tensor.split(GRAIN) if alike else [tensor])
    return chunks


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps."""
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


@cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process; a fork of it has none of them."""
    return ThreadPoolExecutor(count, thread_name_prefix="teacher")
