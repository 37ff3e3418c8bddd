"""The GPU operators of BatchNorm for CPU tensors, from their definitions, so that tests run the GPU's code path.

Importing this module registers them. PyTorch has `aten::batch_norm_stats` and its relatives for GPUs only.
"""

import torch
from torch import Tensor

import sslkit.parts.batchnorm.chunk_kernels  # noqa: F401

ours = torch.library.Library("sslkit", "IMPL")
pytorchs = torch.library.Library("aten", "IMPL")


def rows_of(x: Tensor, chunks: int) -> Tensor:
    """(k, M, C) in the dtype of the sums."""
    work = torch.promote_types(x.dtype, torch.float32)
    return x.movedim(1, -1).reshape(chunks, -1, x.shape[1]).to(work)


def like(rows: Tensor, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out.copy_(rows.reshape(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1))
    return out


def spread(moments: Tensor, count: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation, (k, 1, C)."""
    return moments[0][:, None], (moments[1][:, None] / count + eps).rsqrt()


def chunk_moments(x: Tensor, chunks: int, per: int) -> Tensor:
    assert x.movedim(1, -1).is_contiguous()
    parts = rows_of(x, chunks).split(per, dim=1)
    return torch.stack([torch.stack([p.mean(1), p.var(1, correction=0) * p.shape[1]]) for p in parts])


def combine_moments(
    parts: Tensor,
    count: int,
    per: int,
    views: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
) -> Tensor:
    weights = torch.tensor([min(per, count - part * per) for part in range(len(parts))]).to(parts)[:, None, None]
    assert weights.sum() == count
    mean = (parts[:, 0] * weights).sum(0) / count
    deviations = (parts[:, 1] + weights * (parts[:, 0] - mean) ** 2).sum(0)
    if running_mean is not None and running_var is not None:
        for means, variances in zip(mean.chunk(views), (deviations / (count - 1)).chunk(views), strict=True):
            running_mean.copy_((1 - momentum) * running_mean + momentum * means.mean(0))
            running_var.copy_((1 - momentum) * running_var + momentum * variances.mean(0))
    return torch.stack([mean, deviations])


def normalise_chunks(
    x: Tensor, moments: Tensor, weight: Tensor | None, bias: Tensor | None, count: int, eps: float
) -> Tensor:
    mean, scale = spread(moments, count, eps)
    out = (rows_of(x, moments.shape[1]) - mean) * scale
    out = out if weight is None else out * weight
    return like(out if bias is None else out + bias, x)


def chunk_gradient_sums(grad: Tensor, x: Tensor, moments: Tensor, count: int, eps: float, per: int) -> Tensor:
    assert grad.movedim(1, -1).is_contiguous()
    chunks = moments.shape[1]
    mean, scale = spread(moments, count, eps)
    grads, rows = rows_of(grad, chunks), (rows_of(x, chunks) - mean) * scale
    parts = zip(grads.split(per, 1), (grads * rows).split(per, 1), strict=True)
    return torch.stack([torch.stack([one.sum(1), other.sum(1)]) for one, other in parts])


def chunk_gradients(
    grad: Tensor, x: Tensor, moments: Tensor, weight: Tensor | None, sums: Tensor, count: int, eps: float
) -> Tensor:
    chunks = moments.shape[1]
    mean, scale = spread(moments, count, eps)
    rows = (rows_of(x, chunks) - mean) * scale
    out = (rows_of(grad, chunks) - sums[0][:, None] / count - rows * sums[1][:, None] / count) * scale
    return like(out if weight is None else out * weight, x)


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = rows_of(x, 1)[0]
    return rows.mean(0), (rows.var(0, correction=0) + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    assert running_mean is None or counts.dtype == running_mean.dtype
    weights, total = counts[:, None].to(mean), counts.sum().to(mean)
    everyone = (weights * mean).sum(0) / total
    deviations = (weights * (invstd**-2 - eps + (mean - everyone) ** 2)).sum(0)
    if running_mean is not None and running_var is not None:
        running_mean.copy_((1 - momentum) * running_mean + momentum * everyone)
        running_var.copy_((1 - momentum) * running_var + momentum * deviations / (total - 1))
    return everyone, (deviations / total + eps).rsqrt()


def batch_norm_elemt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    out = (rows_of(x, 1) - mean) * invstd
    out = out if weight is None else out * weight
    return like(out if bias is None else out + bias, x)


def batch_norm_backward_reduce(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, *needed: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    grads, centred = rows_of(grad, 1)[0], rows_of(x, 1)[0] - mean
    total, products = grads.sum(0), (grads * centred).sum(0)
    return total, products, products * invstd if needed[1] else None, total.clone() if needed[2] else None


def batch_norm_backward_elemt(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    total: Tensor,
    products: Tensor,
    counts: Tensor,
) -> Tensor:
    assert counts.dtype == torch.int32
    count = counts.sum()
    centred = rows_of(x, 1) - mean
    out = (rows_of(grad, 1) - total / count - centred * invstd**2 * products / count) * invstd
    return like(out if weight is None else out * weight, x)


for function in (chunk_moments, combine_moments, normalise_chunks, chunk_gradient_sums, chunk_gradients):
    ours.impl(function.__name__, function, "CPU")
for function in (
    batch_norm_stats,
    batch_norm_gather_stats_with_counts,
    batch_norm_elemt,
    batch_norm_backward_reduce,
    batch_norm_backward_elemt,
):
    pytorchs.impl(function.__name__, function, "CPU")
