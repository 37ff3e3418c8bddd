"""Normalisation: the numbers of the formula, and constants that are uploaded once."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sslkit.data.augment.cpu import Normaliser, normalise


class Uploads(TorchDispatchMode):
    """Counts copies to the fake GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("_to_copy", "copy_"):
            self.count += int(out.is_cuda and not args[-1].is_cuda)
        return out


class FakeGpu(FakeTensorMode):
    """Asks for no driver."""

    avoid_device_init = True


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_numbers_are_those_of_the_formula(channels: int, dtype: type) -> None:
    generator = np.random.default_rng(channels)
    full_scale = np.float32(np.iinfo(dtype).max)
    pixels: Any = generator.integers(0, int(full_scale) + 1, (3, 9, 7, channels)).astype(dtype)
    mean, std = (generator.uniform(0.2, 0.6, channels).astype(np.float32) for _ in range(2))
    expected = (pixels.astype(np.float32) - mean * full_scale) / (std * full_scale)
    keeper = Normaliser(tuple(mean.tolist()), tuple(std.tolist()))
    for found in (keeper(torch.from_numpy(pixels)), keeper(torch.from_numpy(pixels)), once(pixels, mean, std)):
        assert found.shape == (3, channels, 9, 7)
        assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), expected)
    assert channels == 1 or found.is_contiguous(memory_format=torch.channels_last)


def once(pixels: Any, mean: Any, std: Any) -> torch.Tensor:
    return normalise(torch.from_numpy(pixels), tuple(mean.tolist()), tuple(std.tolist()))


def test_constants_are_uploaded_once_a_run() -> None:
    """A run on a fake GPU, and then another: no tensor of the first is left in the second."""
    uploads = [count_uploads(calls) for calls in (1, 4)]
    assert uploads == [2, 2]
    assert normalise(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), (0.5,) * 3, (0.5,) * 3).unique().tolist() == [-1.0]


def count_uploads(calls: int) -> int:
    run = Normaliser((0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
    uploads = Uploads()
    with FakeGpu():
        pixels = torch.empty(4, 8, 8, 3, dtype=torch.uint8, device="cuda")
        with uploads:
            for _ in range(calls):
                assert run(pixels).device.type == "cuda"
    return uploads.count


def test_it_compiles_without_a_break() -> None:
    run = Normaliser((0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
    pixels = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(run, backend="eager", fullgraph=True)
    assert torch.equal(compiled(pixels), run(pixels))
