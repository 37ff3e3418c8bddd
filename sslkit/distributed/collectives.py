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
def sum_with_gradient(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum a tensor over the processes of ``group`` (None: all); the gradient reaches every process's own addend."""
    if world_size() == 1:
        return values
    result: Tensor = _AllReduceSum.apply(values, group)
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


def processes_sharing_a_group(groups: int) -> dist.ProcessGroup | None:
    """The processes that share a batch group with this one, where ``groups`` groups span all processes.

    None where a group spans all of them, or lies on one alone. Called by all processes at the same time.
    """
    size = world_size() // groups
    if groups == 1 or size <= 1:
        return None
    own, _ = dist.new_subgroups(group_size=size)
    return own


@named
@torch.no_grad()
def average_tensors(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over processes, in one reduction."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


@named
@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """Average the gradients of ``module`` over processes, in one reduction for each dtype."""
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
