"""What the methods need of other processes. On one process every function is the identity or close to it.

Every process holds the same number of rows B; the global batch is the N = B * world_size rows in rank order.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """Collect the rows of all processes in rank order, (B, ...) -> (N, ...). Carries **no** gradient."""
    if world_size() == 1:
        return rows.detach()
    gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


@torch.no_grad()
def exchange_rows(rows: Tensor, permutation: NDArray[np.int64]) -> Tensor:
    """Permute the global batch, moving to each process only the rows it will own.

    Equal to ``gather_rows(rows)[permutation][rank * B : (rank + 1) * B]``, at 1 / world_size of the traffic.

    Args:
        rows: (B, ...), this process's part of the global batch.
        permutation: (N,) int64, the same on every process: row ``j`` of the result is row ``permutation[j]`` of the
            global batch. An array, not a tensor: every process plans the exchange on the host.
    """
    if world_size() == 1:
        return rows[torch.from_numpy(permutation).to(rows.device)]
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


def sum_with_gradient(values: Tensor) -> Tensor:
    """Sum a tensor over processes; the gradient of the sum reaches every process's own addend."""
    if world_size() == 1:
        return values
    result: Tensor = _AllReduceSum.apply(values)
    return result


def mean_over_processes(values: Tensor) -> Tensor:
    """Average a tensor over processes, without gradient; used for what is logged."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


@torch.no_grad()
def copy_buffers_from_first(module: nn.Module) -> None:
    """Give every process the first one's buffers: the running statistics that evaluation and export use."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


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
