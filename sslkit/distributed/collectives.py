"""Collectives on tensors, with and without gradient. On one process each returns its input, or nearly so.

Every process holds the same number of rows B. The global batch is the N = B * world_size rows in rank order.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

Params = ParamSpec("Params")
Result = TypeVar("Result")
_running: list[str] = []


def tracked(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Make `running_collective` return the name of ``function`` while it waits for other processes."""

    @wraps(function)
    def call(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        _running[:] = [function.__name__.strip("_")]
        result = function(*args, **kwargs)
        _running.clear()  # not in a `finally`: after a failure the name is still wanted
        return result

    return call


def running_collective() -> str:
    """Name of the collective that this process waits in or failed in; empty if there is none."""
    return _running[0] if _running else ""


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


@tracked
@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """Collect the rows of all processes in rank order, (B, ...) -> (N, ...). Carries **no** gradient."""
    if world_size() == 1:
        return rows.detach()
    gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


def gather_rows_with_gradient(rows: Tensor) -> Tensor:
    """Collect the rows of all processes in rank order, (B, ...) -> (N, ...), with gradient.

    Each process receives the sum of all processes' gradients of its own rows. After DDP's mean over processes this is
    the gradient that one process would have on the whole batch. `gather_rows` would give another one.
    """
    if world_size() == 1:
        return rows
    result: Tensor = _GatherRows.apply(rows)
    return result


@tracked
def exchange_rows(rows: Tensor, permutation: NDArray[np.int64]) -> Tensor:
    """Permute the global batch, moving to each process only the rows it will own.

    Equal to ``gather_rows(rows)[permutation][rank * B : (rank + 1) * B]``, at 1 / world_size of the traffic, and
    with gradient.

    Args:
        rows: (B, ...), this process's part of the global batch.
        permutation: (N,) int64, the same on every process. Row ``j`` of the result is row ``permutation[j]`` of the
            global batch. An array, because every process plans the exchange on the host.
    """
    if world_size() == 1:
        return rows[torch.from_numpy(permutation).to(rows.device)]
    result: Tensor = _ExchangeRows.apply(rows, permutation)
    return result


def _exchange(rows: Tensor, permutation: NDArray[np.int64]) -> Tensor:
    batch, me = rows.shape[0], rank()
    owner_of_source = permutation // batch
    owner_of_target = np.arange(len(permutation)) // batch
    outgoing = owner_of_source == me
    incoming = owner_of_target == me
    send_counts = np.bincount(owner_of_target[outgoing], minlength=world_size()).tolist()
    receive_counts = np.bincount(owner_of_source[incoming], minlength=world_size()).tolist()
    sent = rows[torch.from_numpy(permutation[outgoing] % batch).to(rows.device)].contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, receive_counts, send_counts)
    # Rows arrive grouped by sender; a stable sort of the senders says where each belongs.
    arrival = np.argsort(owner_of_source[incoming], kind="stable")
    result = torch.empty_like(received)
    result[torch.from_numpy(arrival).to(rows.device)] = received
    return result


@tracked
def sum_with_gradient(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum a tensor over the processes of ``group`` (None: all). The gradient reaches the summand of every process."""
    if world_size() == 1:
        return values
    result: Tensor = _AllReduceSum.apply(values, group)
    return result


@tracked
def sum_over_processes(values: Tensor) -> Tensor:
    """Sum a tensor over processes, without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


@tracked
def max_over_processes(values: Tensor) -> Tensor:
    """Maximum of each element over processes, without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean of a tensor over processes, without gradient; for what is logged."""
    return sum_over_processes(values) / world_size()


@tracked
def gather_objects(value: Result) -> list[Result]:
    """Collect a plain value of every process, in rank order. Slow: only for rare and small values."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


@tracked
@torch.no_grad()
def broadcast_buffers(module: nn.Module) -> None:
    """Copy the first process's buffers to all: the running statistics that evaluation and export use."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def subgroup_of(groups: int) -> dist.ProcessGroup | None:
    """The process group of those that share a BN group with this one, if ``groups`` groups span all processes.

    None if a group spans all processes or lies on one. Must be called by all processes at the same time.
    """
    size = world_size() // groups
    if groups == 1 or size <= 1:
        return None
    own, _ = dist.new_subgroups(group_size=size)
    return own


@tracked
@torch.no_grad()
def average_tensors(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over processes, in one all-reduce."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


@tracked
@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """Average the gradients of ``module`` over processes, in one all-reduce for each dtype."""
    if world_size() == 1:
        return
    grads = [param.grad for param in module.parameters() if param.grad is not None]
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        average_tensors([grad for grad in grads if grad.dtype == dtype])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.batch = rows.shape[0]
        return gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[rank() * ctx.batch : (rank() + 1) * ctx.batch]


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, permutation: NDArray[np.int64]) -> Tensor:
        ctx.permutation = permutation
        return _exchange(rows, permutation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _exchange(grads[0], np.argsort(ctx.permutation)), None


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
