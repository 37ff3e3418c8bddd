"""Batch normalisation on a GPU as functions with gradient: of several processes, and of chunks of the rows."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sslkit.parts.batchnorm.chunk_kernels import available, operators, rows_of_a_split, sizes_of


@dataclass(frozen=True)
class Normalisation:
    """How rows are normalised.

    Attributes:
        eps: Added to the variance.
        momentum: Weight of the batch in the running statistics.
        group: The processes whose rows are normalised together; None: all.
        processes: Their number.
        chunks: Number of contiguous equal chunks of the rows, each with statistics of its own.
        views: The running statistics are updated once for each of so many runs of chunks, by their mean over a run.
    """

    eps: float
    momentum: float
    group: dist.ProcessGroup | None = None
    processes: int = 1
    chunks: int = 1
    views: int = 1


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    how: Normalisation,
) -> Tensor:
    """BatchNorm in training, (B, C, ...) to the same shape. The running statistics are updated in place.

    ``how`` asks for several chunks, or several processes, or both.
    """
    # `torch.compile` knows no shapes of PyTorch's kernels.
    by_chunk = how.chunks > 1 or (torch.compiler.is_compiling() and available())
    function = _ChunkedBatchNorm if by_chunk else _SynchronisedBatchNorm
    x = _channels_innermost(x) if by_chunk else _dense(x)
    out: Tensor = function.apply(x, weight, bias, running_mean, running_var, how)
    return out


def gather_statistics(values: Tensor, how: Normalisation) -> Tensor:
    """Collect a tensor of each process, (processes, ...)."""
    gathered = values.new_empty((how.processes, *values.shape))
    dist.all_gather_into_tensor(gathered.flatten(0, 1), values, group=how.group)
    return gathered


def sum_of_gradients(sums: Tensor, how: Normalisation) -> Tensor:
    """Sum a tensor over processes."""
    total = sums.clone()
    dist.all_reduce(total, group=how.group)
    return total


class _SynchronisedBatchNorm(torch.autograd.Function):
    """BatchNorm over the rows of several processes, by PyTorch's kernels for SyncBatchNorm.

    PyTorch's own layer allows processes to have no rows, and masks those out: the host waits three times a layer. Here
    every process has the same number of rows, so counts are constants and nothing is waited for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        how: Normalisation,
    ) -> Tensor:
        mean, invstd = torch.batch_norm_stats(x, how.eps)
        gathered = gather_statistics(torch.stack([mean, invstd]), how)
        dtype = mean.dtype if running_mean is None else running_mean.dtype
        rows = x.numel() // x.shape[1]
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x,
            gathered[:, 0],
            gathered[:, 1],
            running_mean,
            running_var,
            how.momentum,
            how.eps,
            torch.full((how.processes,), rows, dtype=dtype, device=x.device),
        )
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.how = how
        out: Tensor = torch.batch_norm_elemt(x, weight, bias, mean, invstd, how.eps)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        grad, needed = _dense(grads[0]), ctx.needs_input_grad
        *sums, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, invstd, weight, needed[0], needed[1], needed[2]
        )
        grad_x = None
        if needed[0]:
            total, products = sum_of_gradients(torch.stack(sums), ctx.how)
            counts = torch.full((ctx.how.processes,), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
            weight = None if weight is None else weight.to(mean.dtype)
            grad_x = torch.batch_norm_backward_elemt(grad, x, mean, invstd, weight, total, products, counts)
        return grad_x, grad_weight if needed[1] else None, grad_bias if needed[2] else None, None, None, None


class _ChunkedBatchNorm(torch.autograd.Function):
    """BatchNorm of contiguous equal chunks of the rows, each by its own statistics, on one or several processes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        how: Normalisation,
    ) -> Tensor:
        chunks, local, channels = sizes_of(x, how.chunks)
        count, per = local * how.processes, rows_of_a_split(chunks, local, channels)
        parts = operators.chunk_moments(x, chunks, per)
        if how.processes > 1:
            own = operators.combine_moments(parts, local, per, 1, None, None, how.momentum)
            parts, per = gather_statistics(own, how), local
        moments = operators.combine_moments(parts, count, per, how.views, running_mean, running_var, how.momentum)
        ctx.save_for_backward(x, moments, weight)
        ctx.how = how
        out: Tensor = operators.normalise_chunks(x, moments, weight, bias, count, how.eps)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, moments, weight = ctx.saved_tensors
        how, needed = ctx.how, ctx.needs_input_grad
        grad = _channels_innermost(grads[0])
        chunks, local, channels = sizes_of(x, how.chunks)
        count, per = local * how.processes, rows_of_a_split(chunks, local, channels)
        sums = operators.chunk_gradient_sums(grad, x, moments, count, how.eps, per).sum(dim=0)
        grad_bias, grad_weight = sums.sum(dim=1) if needed[1] or needed[2] else (None, None)
        grad_x = None
        if needed[0]:
            total = sum_of_gradients(sums, how) if how.processes > 1 else sums
            grad_x = operators.chunk_gradients(grad, x, moments, weight, total, count, how.eps)
        return grad_x, grad_weight if needed[1] else None, grad_bias if needed[2] else None, None, None, None


def _dense(x: Tensor) -> Tensor:
    """Without gaps: channels-last stays so."""
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if channels_last else x.contiguous()


def _channels_innermost(x: Tensor) -> Tensor:
    """(B, C, ...) with the channels innermost in memory; channels-last is not copied."""
    moved = x.movedim(1, -1)
    return x if moved.is_contiguous() else moved.contiguous().movedim(-1, 1)
