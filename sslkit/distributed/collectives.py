"""Collectives on tensors, with and without gradient. On one process each returns its input, or nearly so.

Every process holds the same number of rows B. The global batch is the N = B * world_size rows in rank order.
"""

import os
from collections.abc import Callable, Iterable
from functools import partial, wraps
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


def processes_started() -> int:
    """Number of processes that the launcher started, on all machines; known before there is a process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Index of this process; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to ``device``; a GPU receives it when it gets there, and the host does not wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


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

    Each process receives the sum of all processes' gradients of its own rows; after DDP's mean over processes this is
    the gradient of one process on the whole batch.
    """
    if world_size() == 1:
        return rows
    own = slice(rank() * len(rows), (rank() + 1) * len(rows))
    return _linear(rows, gather_rows, lambda grad: _all_reduced(grad)[own])


@tracked
def exchange_rows(rows: Tensor, permutation: NDArray[np.int64]) -> Tensor:
    """Permute the global batch, (B, ...) -> (B, ...) on each process, which receives only the rows it will own.

    Equal to ``gather_rows(rows)[permutation][rank * B : (rank + 1) * B]``, at 1 / world_size of the traffic, and
    with gradient. ``permutation`` (N,) is the same on every process: an array, as the exchange is planned on the host.
    """
    if world_size() == 1:
        return rows[upload(torch.from_numpy(permutation), rows.device)]
    return _linear(
        rows, lambda rows: _exchange(rows, permutation), lambda grad: _exchange(grad, np.argsort(permutation))
    )


def _exchange(rows: Tensor, permutation: NDArray[np.int64]) -> Tensor:
    batch, me = rows.shape[0], rank()
    owner_of_source = permutation // batch
    owner_of_target = np.arange(len(permutation)) // batch
    outgoing = owner_of_source == me
    incoming = owner_of_target == me
    send_counts = np.bincount(owner_of_target[outgoing], minlength=world_size()).tolist()
    receive_counts = np.bincount(owner_of_source[incoming], minlength=world_size()).tolist()
    sent = rows[upload(torch.from_numpy(permutation[outgoing] % batch), rows.device)].contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, receive_counts, send_counts)
    # Rows arrive grouped by sender; a stable sort of the senders says where each belongs.
    arrival = np.argsort(owner_of_source[incoming], kind="stable")
    result = torch.empty_like(received)
    result[upload(torch.from_numpy(arrival), rows.device)] = received
    return result


@tracked
def sum_with_gradient(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum a tensor over the processes of ``group`` (None: all). The gradient reaches the summand of every process."""
    if world_size() == 1:
        return values
    all_reduce = partial(_all_reduced, group=group)
    return _linear(values, all_reduce, all_reduce)


@tracked
def sum_over_processes(values: Tensor) -> Tensor:
    """Sum a tensor over processes, without gradient."""
    return _all_reduced(values.detach())


@tracked
def max_over_processes(values: Tensor) -> Tensor:
    """Maximum of each element over processes, without gradient."""
    return _all_reduced(values.detach(), op=dist.ReduceOp.MAX)


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
    if world_size() == 1:
        return
    for alike in tensors_by_dtype(module.buffers()):
        flat = torch.cat([buffer.flatten() for buffer in alike])
        dist.broadcast(flat, src=0)
        _scatter(flat, alike)


def subgroup_of(groups: int) -> dist.ProcessGroup | None:
    """The processes that share a BN group with this one, if ``groups`` groups span all; None if one group spans all.

    None also if a group lies on one process. Must be called by all processes at the same time.
    """
    size = world_size() // groups
    return None if groups == 1 or size <= 1 else dist.new_subgroups(group_size=size)[0]


@tracked
@torch.no_grad()
def average_tensors(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over processes, in one all-reduce."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    _scatter(flat, tensors)


def tensors_by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Lists of tensors of one dtype each, which PyTorch handles in one operator."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return list(found.values())


def _scatter(flat: Tensor, tensors: list[Tensor]) -> None:
    """Copy the parts of ``flat`` to the tensors that it was put together from."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


_DUE: list[Tensor] = []


def average_later(tensors: list[Tensor]) -> None:
    """Let the next `mean_with_due` average these tensors in place, which saves a collective."""
    _DUE.extend(tensors)


@torch.no_grad()
def mean_with_due(values: Tensor) -> Tensor:
    """Mean of a tensor (n,) over processes, in one all-reduce with what `average_later` was given."""
    due = [values, *_DUE]
    _DUE.clear()
    flat = torch.cat([each.detach().flatten() for each in due])
    total = sum_over_processes(flat) / world_size()
    if len(due) > 1:
        _scatter(total[len(values) :], due[1:])
    return total[: len(values)]


def average_gradients(module: nn.Module) -> None:
    """Average the gradients of ``module`` over processes, in one all-reduce for each dtype."""
    for grads in tensors_by_dtype(param.grad for param in module.parameters() if param.grad is not None):
        average_tensors(grads)


def _all_reduced(
    values: Tensor, group: dist.ProcessGroup | None = None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(total, op=op, group=group)
    return total


def _linear(values: Tensor, function: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a linear function of the tensors of all processes; ``transpose`` maps the gradient back."""
    result: Tensor = _Linear.apply(values, function, transpose)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, function: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.transpose = transpose
        return function(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose(grads[0]), None, None
