"""The momentum teacher: a copy of a module that follows its student as a moving average."""

import copy
import operator
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase

from sslkit.distributed.sharding import local_shard
from sslkit.parts.batchnorm import GlobalBatchNorm
from sslkit.parts.schedules import Progress
from sslkit.parts.update_gate import current_gate

CONVERTED_BY_AUTOCAST = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d}
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
        self._low_precision = LowPrecisionWeights()
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
        with self._low_precision.used_by(self.module):
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


class LowPrecisionWeights:
    """Weights of linear and convolutional layers in the dtype of autocast, converted once after every change.

    Autocast itself converts them in each forward pass: it keeps only what requires gradient. The module's own weights,
    its state dict and the numbers that it computes stay as they are.
    """

    def __init__(self) -> None:
        self._places: list[tuple[dict[str, Any], str]] | None = None  # the dict that holds each weight, and its name
        self._originals: list[Tensor] = []
        self._versions: list[int] = []
        self._converted: list[Tensor] = []  # empty where the originals are not converted: shards, for example

    def __deepcopy__(self, memo: dict[int, Any]) -> "LowPrecisionWeights":
        return LowPrecisionWeights()

    @contextmanager
    def used_by(self, module: nn.Module) -> Iterator[None]:
        """Let the layers of ``module``, always the same one, hold the converted weights where autocast is on."""
        if self._places is None:
            self._places = _places_of_weights(module)
        originals: list[Tensor] = [held[name] for held, name in self._places]
        device = originals[0].device.type if originals else "cpu"
        if originals and torch.is_autocast_enabled(device):
            self._refresh(originals, torch.get_autocast_dtype(device))
            try:
                for (held, name), converted in zip(self._places, self._converted, strict=False):
                    held[name] = converted
                yield
            finally:
                for (held, name), original in zip(self._places, originals, strict=True):
                    held[name] = original
        else:
            yield

    def _refresh(self, originals: list[Tensor], dtype: torch.dtype) -> None:
        """Convert the weights again unless they are the same tensors, unchanged."""
        versions = [param._version for param in originals]
        convertible = all(param.dtype == torch.float32 and not isinstance(param, DTensor) for param in originals)
        same = len(self._originals) == len(originals) and all(map(operator.is_, self._originals, originals))
        same = same and all(each.dtype == dtype and each.device == originals[0].device for each in self._converted)
        if not convertible:
            self._converted = []
        elif not same or not self._converted:
            self._converted = [torch.empty_like(param, dtype=dtype) for param in originals]
            torch._foreach_copy_(self._converted, originals)
        elif versions != self._versions:
            torch._foreach_copy_(self._converted, originals)
        self._originals, self._versions = originals, versions


def _places_of_weights(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the weights are that autocast converts; nowhere if a part is compiled, which converts by itself."""
    layers = list(module.modules())
    if any(layer._compiled_call_impl is not None for layer in layers):
        return []
    # A subclass may do more with its weight than to multiply by it.
    plain = [layer for layer in layers if type(layer) in CONVERTED_BY_AUTOCAST]
    return [
        (layer._parameters, name) for layer in plain for name, held in layer._parameters.items() if held is not None
    ]


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
    increment_version(own)  # a fused update does not


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
