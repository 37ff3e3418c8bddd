"""Run with TRITON_INTERPRET=1: the Triton kernels on CPU tensors against the operators' definitions.

Prints one line of JSON: {case: largest difference, relative to numbers above 1}.
"""

import itertools
import json

import device_operators as expected
import torch
from torch import Tensor

from sslkit.parts.batchnorm import chunk_kernels

EPS, MOMENTUM = 1e-5, 0.1


def difference(a: Tensor, b: Tensor) -> float:
    assert a.dtype == b.dtype
    assert a.stride() == b.stride()
    return float(((a.double() - b.double()).abs() / b.double().abs().clamp(min=1.0)).max())


def compare(shape: tuple[int, ...], chunks: int, dtype: torch.dtype, *, views: int, affine: bool) -> float:
    """Largest difference of any result; the kernels' own results go into the next kernel."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if len(shape) == 4:
        x, grad = (each.to(memory_format=torch.channels_last) for each in (x, grad))
    x, grad = (3 * x + 2).to(dtype), grad.to(dtype)
    work = torch.promote_types(dtype, torch.float32)
    weight, bias, mean = (torch.randn(shape[1], generator=generator, dtype=work) for _ in range(3))
    var = mean.square() + 1
    found, wanted = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    scale = (weight, bias) if affine else (None, None)
    _, count, channels = chunk_kernels.sizes_of(x, chunks)
    per = chunk_kernels.rows_of_a_split(chunks, count, channels)
    parts = chunk_kernels.chunk_moments(x, chunks, per)
    moments = chunk_kernels.combine_moments(parts, count, per, views, *found, MOMENTUM)
    sums = chunk_kernels.chunk_gradient_sums(grad, x, moments, count, EPS, per)
    untracked = chunk_kernels.combine_moments(parts, count, per, 1, None, None, 0.0)
    totals = sums.sum(0)
    pairs = [
        (
            moments,
            expected.combine_moments(expected.chunk_moments(x, chunks, per), count, per, views, *wanted, MOMENTUM),
        ),
        (untracked, moments),
        *zip(found, wanted, strict=True),
        (
            chunk_kernels.normalise_chunks(x, moments, *scale, count, EPS),
            expected.normalise_chunks(x, moments, *scale, count, EPS),
        ),
        (sums, expected.chunk_gradient_sums(grad, x, moments, count, EPS, per)),
        (
            chunk_kernels.chunk_gradients(grad, x, moments, scale[0], totals, count, EPS),
            expected.chunk_gradients(grad, x, moments, scale[0], totals, count, EPS),
        ),
    ]
    return max(difference(*pair) for pair in pairs)


def main() -> None:
    cases = {
        "rows": ((12, 5), 3, 1, True),
        "images": ((8, 96, 6, 5), 2, 2, True),  # two blocks of channels
        "splits": ((4, 3, 30, 31), 2, 1, False),  # several splits of a chunk, the last with fewer rows
        "views": ((12, 4, 3, 3), 6, 2, True),
    }
    results = {
        f"{name} {str(dtype).removeprefix('torch.')}": compare(shape, chunks, dtype, views=views, affine=affine)
        for (name, (shape, chunks, views, affine)), dtype in itertools.product(
            cases.items(), (torch.float64, torch.float32, torch.bfloat16)
        )
    }
    x = torch.ones(8, 3).index_fill(0, torch.tensor([5]), torch.nan)
    moments = chunk_kernels.combine_moments(chunk_kernels.chunk_moments(x, 2, 64), 4, 64, 1, None, None, 0.0)
    out = chunk_kernels.normalise_chunks(x, moments, None, None, 4, EPS)
    # Not in the first of the two chunks.
    results["nan in"] = float(moments[:, 1].isnan().all() and not moments[:, 0].isnan().any())
    results["nan out"] = float(out[4:].isnan().all() and not out[:4].isnan().any())
    print("RESULT " + json.dumps(results))


main()
