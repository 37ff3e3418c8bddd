"""What the methods need of other processes. On one process every function is the identity or close to it.

Every process holds the same number of rows B; the global batch is the N = B * world_size rows in rank order.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

Words = ParamSpec("Words")
Result = TypeVar("Result")
_under_way: list[str] = []


def named(function: Callable[Words, Result]) -> Callable[Words, Result]:
    """Let `under_way` know while ``function`` waits for other processes."""

    @wraps(function)
    def call(*args: Words.args, **kwargs: Words.kwargs) -> Result:
        _under_way[:] = [function.__name__.strip("_")]
        result = function(*args, **kwargs)
        _under_way.clear()  # not in a `finally`: where it failed is what one wants to know
        return result

    return call


def under_way() -> str:
    """The collective that this process waits in, or failed in; empty if none."""
    return _under_way[0] if _under_way else ""


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


@named
@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """Collect the rows of all processes in rank order, (B, ...) -> (N, ...). Carries **no** gradient."""
    if world_size() == 1:
        return rows.detach()
    gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


def gather_rows_with_gradient(rows: Tensor) -> Tensor:
    """Collect the rows of all processes in rank order, (B, ...) -> (N, ...), and let the gradient travel back.

    Each process gets the sum of all processes' gradients of its own rows. DDP's mean over processes then makes the
    gradient that one process has on the whole batch; without gradient it would be another.
    """
    if world_size() == 1:
        return rows
    result: Tensor = _GatherRows.apply(rows)
    return result


@named
def exchange_rows(rows: Tensor, permutation: NDArray[np.int64]) -> Tensor:
    """Permute the global batch, moving to each process only the rows it will own.

    Equal to ``gather_rows(rows)[permutation][rank * B : (rank + 1) * B]``, at 1 / world_size of the traffic. A
    gradient goes back the same way.

    Args:
        rows: (B, ...), this process's part of the global batch.
        permutation: (N,) int64, the same on every process: row ``j`` of the result is row ``permutation[j]`` of the
            global batch. An array, not a tensor: every process plans the exchange on the host.
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


@named
def sum_with_gradient(values: Tensor) -> Tensor:
    """Sum a tensor over processes; the gradient of the sum reaches every process's own addend."""
    if world_size() == 1:
        return values
    result: Tensor = _AllReduceSum.apply(values)
    return result


@named
def sum_over_processes(values: Tensor) -> Tensor:
    """Sum a tensor over processes, without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


@named
def max_over_processes(values: Tensor) -> Tensor:
    """The largest of each element over processes, without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def mean_over_processes(values: Tensor) -> Tensor:
    """Average a tensor over processes, without gradient; used for what is logged."""
    return sum_over_processes(values) / world_size()


@named
def gather_objects(value: Result) -> list[Result]:
    """Every process's plain value, in rank order. For what is rare and small: it is slow."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


@named
@torch.no_grad()
def copy_buffers_from_first(module: nn.Module) -> None:
    """Give every process the first one's buffers: the running statistics that evaluation and export use."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


@named
@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """Average the gradients of ``module`` over processes, in one reduction for each dtype."""
    if world_size() == 1:
        return
    grads = [param.grad for param in module.parameters() if param.grad is not None]
    for dtype in {grad.dtype for grad in grads}:
        alike = [grad for grad in grads if grad.dtype == dtype]
        flat = torch.cat([grad.flatten() for grad in alike])
        dist.all_reduce(flat)
        flat /= world_size()
        for grad, part in zip(alike, flat.split([grad.numel() for grad in alike]), strict=True):
            grad.copy_(part.view_as(grad))


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
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad
