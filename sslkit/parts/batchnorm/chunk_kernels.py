"""GPU kernels of BatchNorm for contiguous equal chunks of the rows, each with its own statistics.

PyTorch's kernels normalise by channel only. With them there are three ways, judged for 8 chunks of a ResNet-50 (53
layers, channels-last; a pass reads or writes an activation once):

- one native call a chunk: 3 passes forward and 7 backward (gradients are concatenated), 16 operators a layer;
- (g n, C, H, W) copied to (n, g C, H, W), one native call, copied back: 7 passes and 9, 6 operators. BatchNorm is bound
  by memory, so these 4 + 4 passes cost more than the launches that they save;
- `torch.var_mean` and pointwise operators: up to 4 passes and 10, about 20 operators.

These kernels need 3 passes and 5, as undivided BatchNorm does, and 7 launches. They are Triton's, which PyTorch
installs with its CUDA and ROCm builds; sums are in a fixed order, so results are the same in every run.

``x`` is (B, C, ...) with the channels innermost in memory, as in channels-last: k chunks of M rows (images times
pixels) of C channels. Moments are (2, k, C), the mean and the sum of squared deviations from it, in float32, or in
float64 if ``x`` is.
"""
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, no-untyped-call, untyped-decorator"

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of PyTorch for CPUs, or Windows
    triton = None

TILE = 4096  # elements that a program works on at once
PROGRAMS = 1024  # enough for every GPU; constant, so that sums are in the same order on all of them
MOST_SPLITS = 256
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}  # fused multiply-add, as PyTorch's kernels


def available() -> bool:
    """Whether the kernels can be compiled on this machine."""
    return triton is not None


def rows_of_a_split(chunks: int, rows: int, channels: int) -> int:
    """Rows that one program adds up: each chunk is split, so that there are enough programs."""
    tile_rows, tile_channels = _tile(channels)
    blocks = chunks * -(-channels // tile_channels)
    splits = max(min(PROGRAMS // blocks, MOST_SPLITS, -(-rows // tile_rows)), 1)
    return -(-rows // (splits * tile_rows)) * tile_rows


def _tile(channels: int) -> tuple[int, int]:
    tile_channels = min(triton.next_power_of_2(channels), 64)
    return TILE // tile_channels, tile_channels


if triton is not None:

    @triton.jit
    def _moments_kernel(tensors, sizes, tile_rows: tl.constexpr, tile_channels: tl.constexpr):
        """Moments of one split of a chunk, by sums of differences from its first row."""
        rows_ptr, parts_ptr = tensors
        chunks, rows, channels, per = sizes
        chunk, split = tl.program_id(0), tl.program_id(1)
        columns = tl.program_id(2) * tile_channels + tl.arange(0, tile_channels)
        inside = columns < channels
        dtype = parts_ptr.dtype.element_ty
        start = split * per
        stop = tl.minimum(start + per, rows)
        base = rows_ptr + chunk.to(tl.int64) * rows * channels
        first = tl.load(base + start.to(tl.int64) * channels + columns, mask=inside, other=0.0).to(dtype)
        total = tl.zeros((tile_rows, tile_channels), dtype)
        squares = tl.zeros((tile_rows, tile_channels), dtype)
        for offset in range(start, stop, tile_rows):
            row = offset + tl.arange(0, tile_rows)
            mask = (row < stop)[:, None] & inside[None, :]
            x = tl.load(base + row.to(tl.int64)[:, None] * channels + columns[None, :], mask=mask, other=0.0).to(dtype)
            difference = tl.where(mask, x - first[None, :], 0.0)
            total += difference
            squares += difference * difference
        shift = tl.sum(total, axis=0) / (stop - start)
        deviations = tl.sum(squares, axis=0) - shift * shift * (stop - start)
        deviations = tl.where(deviations < 0.0, 0.0, deviations)  # keeps NaN
        out = parts_ptr + (2 * split * chunks + chunk) * channels + columns
        tl.store(out, first + shift, mask=inside)
        tl.store(out + chunks * channels, deviations, mask=inside)

    @triton.jit
    def _combine_kernel(
        tensors, sizes, views: tl.constexpr, momentum: tl.constexpr, padded: tl.constexpr, tile_channels: tl.constexpr
    ):
        """Moments of each chunk from those of its parts, and the running statistics."""
        parts_ptr, moments_ptr, mean_ptr, var_ptr = tensors
        parts, chunks, channels, count, per = sizes
        columns = tl.program_id(0) * tile_channels + tl.arange(0, tile_channels)
        inside = columns < channels
        part = tl.arange(0, padded)
        mask = (part < parts)[:, None] & inside[None, :]
        dtype = moments_ptr.dtype.element_ty
        rows = tl.where(part < parts, tl.minimum(count - part * per, per), 0).to(dtype)[:, None]
        groups = chunks // views
        if mean_ptr is not None:
            running_mean = tl.load(mean_ptr + columns, mask=inside, other=0.0).to(dtype)
            running_var = tl.load(var_ptr + columns, mask=inside, other=0.0).to(dtype)
        for view in range(views):
            mean_sum = tl.zeros((tile_channels,), dtype)
            var_sum = tl.zeros((tile_channels,), dtype)
            for group in range(groups):
                chunk = view * groups + group
                place = parts_ptr + (2 * part * chunks + chunk)[:, None] * channels + columns[None, :]
                means = tl.load(place, mask=mask, other=0.0)
                mean = tl.sum(means * rows, axis=0) / count
                apart = tl.where(mask, means - mean[None, :], 0.0)
                deviations = tl.load(place + chunks * channels, mask=mask, other=0.0)
                deviations = tl.sum(deviations + rows * apart * apart, axis=0)
                tl.store(moments_ptr + chunk * channels + columns, mean, mask=inside)
                tl.store(moments_ptr + (chunks + chunk) * channels + columns, deviations, mask=inside)
                mean_sum += mean
                var_sum += deviations / (count - 1)
            if mean_ptr is not None:
                running_mean += momentum * (mean_sum / groups - running_mean)
                running_var += momentum * (var_sum / groups - running_var)
        if mean_ptr is not None:
            tl.store(mean_ptr + columns, running_mean, mask=inside)
            tl.store(var_ptr + columns, running_var, mask=inside)

    @triton.jit
    def _scale(moments_ptr, place, inside, count, eps: tl.constexpr):
        """Mean of each channel of a tile, and 1 / standard deviation."""
        offset, deviations_offset = place
        mean = tl.load(moments_ptr + offset, mask=inside, other=0.0)
        deviations = tl.load(moments_ptr + deviations_offset, mask=inside, other=0.0)
        return mean, 1.0 / tl.sqrt(deviations / count + eps)

    @triton.jit
    def _normalise_kernel(tensors, sizes, eps: tl.constexpr, tile_rows: tl.constexpr, tile_channels: tl.constexpr):
        rows_ptr, moments_ptr, weight_ptr, bias_ptr, out_ptr = tensors
        chunks, rows, channels, count = sizes
        chunk = tl.program_id(1)
        row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
        columns = tl.program_id(2) * tile_channels + tl.arange(0, tile_channels)
        inside = columns < channels
        dtype = moments_ptr.dtype.element_ty
        place = (chunk * channels + columns, (chunks + chunk) * channels + columns)
        mean, scale = _scale(moments_ptr, place, inside, count, eps)
        shift = tl.zeros((tile_channels,), dtype)
        if weight_ptr is not None:
            scale *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(dtype)
        if bias_ptr is not None:
            shift += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(dtype)
        mask = (row < rows)[:, None] & inside[None, :]
        where = (chunk.to(tl.int64) * rows + row)[:, None] * channels + columns[None, :]
        x = tl.load(rows_ptr + where, mask=mask, other=0.0).to(dtype)
        y = (x - mean[None, :]) * scale[None, :] + shift[None, :]
        tl.store(out_ptr + where, y.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _gradient_sums_kernel(tensors, sizes, eps: tl.constexpr, tile_rows: tl.constexpr, tile_channels: tl.constexpr):
        """Of one split of a chunk: sums of the gradient, and of the gradient times the normalised input."""
        grad_ptr, rows_ptr, moments_ptr, parts_ptr = tensors
        chunks, rows, channels, count, per = sizes
        chunk, split = tl.program_id(0), tl.program_id(1)
        columns = tl.program_id(2) * tile_channels + tl.arange(0, tile_channels)
        inside = columns < channels
        dtype = moments_ptr.dtype.element_ty
        place = (chunk * channels + columns, (chunks + chunk) * channels + columns)
        mean, scale = _scale(moments_ptr, place, inside, count, eps)
        total = tl.zeros((tile_rows, tile_channels), dtype)
        products = tl.zeros((tile_rows, tile_channels), dtype)
        start = split * per
        stop = tl.minimum(start + per, rows)
        for offset in range(start, stop, tile_rows):
            row = offset + tl.arange(0, tile_rows)
            mask = (row < stop)[:, None] & inside[None, :]
            where = (chunk.to(tl.int64) * rows + row)[:, None] * channels + columns[None, :]
            grad = tl.load(grad_ptr + where, mask=mask, other=0.0).to(dtype)
            x = tl.load(rows_ptr + where, mask=mask, other=0.0).to(dtype)
            total += grad
            products += tl.where(mask, grad * (x - mean[None, :]) * scale[None, :], 0.0)
        out = parts_ptr + (2 * split * chunks + chunk) * channels + columns
        tl.store(out, tl.sum(total, axis=0), mask=inside)
        tl.store(out + chunks * channels, tl.sum(products, axis=0), mask=inside)

    @triton.jit
    def _gradient_kernel(tensors, sizes, eps: tl.constexpr, tile_rows: tl.constexpr, tile_channels: tl.constexpr):
        grad_ptr, rows_ptr, moments_ptr, weight_ptr, sums_ptr, out_ptr = tensors
        chunks, rows, channels, count = sizes
        chunk = tl.program_id(1)
        row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
        columns = tl.program_id(2) * tile_channels + tl.arange(0, tile_channels)
        inside = columns < channels
        dtype = moments_ptr.dtype.element_ty
        place = (chunk * channels + columns, (chunks + chunk) * channels + columns)
        mean, scale = _scale(moments_ptr, place, inside, count, eps)
        total = tl.load(sums_ptr + chunk * channels + columns, mask=inside, other=0.0) / count
        products = tl.load(sums_ptr + (chunks + chunk) * channels + columns, mask=inside, other=0.0) / count
        mask = (row < rows)[:, None] & inside[None, :]
        where = (chunk.to(tl.int64) * rows + row)[:, None] * channels + columns[None, :]
        grad = tl.load(grad_ptr + where, mask=mask, other=0.0).to(dtype)
        x = tl.load(rows_ptr + where, mask=mask, other=0.0).to(dtype)
        normalised = (x - mean[None, :]) * scale[None, :]
        if weight_ptr is not None:
            scale *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(dtype)
        out = (grad - total[None, :] - normalised * products[None, :]) * scale[None, :]
        tl.store(out_ptr + where, out.to(out_ptr.dtype.element_ty), mask=mask)


def sizes_of(x: Tensor, chunks: int) -> tuple[int, int, int]:
    """Chunks k, rows M of a chunk, channels C."""
    channels = x.shape[1]
    return chunks, x.numel() // (chunks * channels), channels


def chunk_moments(x: Tensor, chunks: int, per: int) -> Tensor:
    """Moments (S, 2, k, C) of the S parts of ``per`` rows (the last may have fewer) of each chunk."""
    parts = _empty_parts(x, chunks, per)
    grid, tile = _grid_of_parts(parts)
    _moments_kernel[grid]((x, parts), (*sizes_of(x, chunks), per), *tile, **LAUNCH)
    return parts


def combine_moments(
    parts: Tensor,
    count: int,
    per: int,
    views: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
) -> Tensor:
    """Moments (2, k, C) of chunks of ``count`` rows from those of their parts, (S, 2, k, C).

    The running statistics are updated in place, once for each of ``views`` consecutive equal runs of chunks, by the
    mean over a run's chunks.
    """
    moments = torch.empty_like(parts[0])
    number, _, chunks, channels = parts.shape
    padded = triton.next_power_of_2(number)
    block = max(min(TILE // padded, 32), 4)
    tensors = (parts, moments, running_mean, running_var)
    sizes = (number, chunks, channels, count, per)
    _combine_kernel[(triton.cdiv(channels, block),)](tensors, sizes, views, momentum, padded, block, **LAUNCH)
    return moments


def normalise_chunks(
    x: Tensor, moments: Tensor, weight: Tensor | None, bias: Tensor | None, count: int, eps: float
) -> Tensor:
    """The output of BatchNorm, like ``x``, with the moments of ``count`` rows."""
    out, sizes = torch.empty_like(x), sizes_of(x, moments.shape[1])
    grid, tile = _grid_of_rows(*sizes)
    _normalise_kernel[grid]((x, moments, weight, bias, out), (*sizes, count), eps, *tile, **LAUNCH)
    return out


def chunk_gradient_sums(grad: Tensor, x: Tensor, moments: Tensor, count: int, eps: float, per: int) -> Tensor:
    """(S, 2, k, C) for the parts of each chunk: sum of the gradient, and of the gradient times the normalised input."""
    chunks = moments.shape[1]
    parts = _empty_parts(x, chunks, per)
    grid, tile = _grid_of_parts(parts)
    sizes = (*sizes_of(x, chunks), count, per)
    _gradient_sums_kernel[grid]((grad, x, moments, parts), sizes, eps, *tile, **LAUNCH)
    return parts


def chunk_gradients(
    grad: Tensor, x: Tensor, moments: Tensor, weight: Tensor | None, sums: Tensor, count: int, eps: float
) -> Tensor:
    """The gradient of the input, like ``x``. ``sums`` (2, k, C) are over the ``count`` rows of each chunk."""
    out, sizes = torch.empty_like(x), sizes_of(x, moments.shape[1])
    grid, tile = _grid_of_rows(*sizes)
    _gradient_kernel[grid]((grad, x, moments, weight, sums, out), (*sizes, count), eps, *tile, **LAUNCH)
    return out


def _empty_parts(x: Tensor, chunks: int, per: int) -> Tensor:
    _, rows, channels = sizes_of(x, chunks)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((-(-rows // per), 2, chunks, channels), dtype=dtype)


def _grid_of_parts(parts: Tensor) -> tuple[tuple[int, int, int], tuple[int, int]]:
    splits, _, chunks, channels = parts.shape
    tile = _tile(channels)
    return (chunks, splits, triton.cdiv(channels, tile[1])), tile


def _grid_of_rows(chunks: int, rows: int, channels: int) -> tuple[tuple[int, int, int], tuple[int, int]]:
    tile = _tile(channels)
    return (triton.cdiv(rows, tile[0]), chunks, triton.cdiv(channels, tile[1])), tile


SCHEMAS = {
    chunk_moments: "(Tensor x, int chunks, int per) -> Tensor",
    combine_moments: (
        "(Tensor parts, int count, int per, int views, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
        "float momentum) -> Tensor"
    ),
    normalise_chunks: "(Tensor x, Tensor moments, Tensor? weight, Tensor? bias, int count, float eps) -> Tensor",
    chunk_gradient_sums: "(Tensor grad, Tensor x, Tensor moments, int count, float eps, int per) -> Tensor",
    chunk_gradients: (
        "(Tensor grad, Tensor x, Tensor moments, Tensor? weight, Tensor sums, int count, float eps) -> Tensor"
    ),
}
SHAPES: dict[str, Callable[..., Tensor]] = {
    "chunk_moments": _empty_parts,
    "combine_moments": lambda parts, *_: torch.empty_like(parts[0]),
    "normalise_chunks": lambda x, *_: torch.empty_like(x),
    "chunk_gradient_sums": lambda _grad, x, moments, _count, _eps, per: _empty_parts(x, moments.shape[1], per),
    "chunk_gradients": lambda _grad, x, *_: torch.empty_like(x),
}
# Operators, so that `torch.compile` need not look inside, and that shapes are known without a GPU.
library = torch.library.Library("sslkit", "DEF")
for function, schema in SCHEMAS.items():
    library.define(function.__name__ + schema, tags=torch.Tag.pt2_compliant_tag)
    library.impl(function.__name__, function, "CUDA")
    torch.library.register_fake(f"sslkit::{function.__name__}", SHAPES[function.__name__], lib=library)
operators: Any = torch.ops.sslkit
