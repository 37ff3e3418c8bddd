"""The precision of a run: what ``[train] precision = "auto"`` is on this device, and float32 with or without TF32."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch.backends import cuda, cudnn

from sslkit.recipe.resolve import Recipe


def training_device() -> torch.device:
    """The type of device that a run on this machine uses."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def gpu_has_bf16() -> bool:
    """Whether the GPU computes in bf16 natively, not emulated: NVIDIA's from Ampere on, and AMD's."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def chosen_precision(recipe: Recipe) -> str:
    """The precision of a run of ``recipe`` on this machine: ``auto`` is bf16 on GPUs that have it, else ``no``."""
    if recipe.train.precision != "auto":
        return recipe.train.precision
    return "bf16" if training_device().type == "cuda" and gpu_has_bf16() else "no"


def resolve_precision(recipe: Recipe) -> Recipe:
    """The recipe with the chosen precision in place of ``auto``, and a remark about it if there is a GPU."""
    if recipe.train.precision != "auto":
        return recipe
    remark = () if training_device().type == "cpu" else (f"precision: {describe_precision(recipe)}",)
    train = recipe.train.model_copy(update={"precision": chosen_precision(recipe)})
    return replace(recipe, train=train, remarks=(*recipe.remarks, *remark))


def describe_precision(recipe: Recipe) -> str:
    """The precision in words, such as ``bf16 (auto; NVIDIA H100)`` or ``float32 (auto; cpu)``."""
    chosen = chosen_precision(recipe)
    words = "float32" if chosen == "no" else chosen
    if recipe.train.precision != "auto":
        return words
    device = training_device().type
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return f"{words} (auto; {name}{' has no bf16' if device == 'cuda' and chosen == 'no' else ''})"


def set_backends(tf32: bool, device: str) -> None:
    """Compute float32 matrix products, convolutions and recurrent layers on GPUs in TF32, or none of them.

    PyTorch's default is TF32 in convolutions only. On GPUs, cuDNN also measures its algorithms once for each shape,
    unless PyTorch was told to be deterministic.

    Args:
        tf32: ``[train] tf32``.
        device: Type of the device of the run.
    """
    # The earlier switches first: torch.compile reads them, and PyTorch raises an error where they contradict the newer.
    cuda.matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    _set_float32_precision(*(["tf32" if tf32 else "ieee"] * 3))
    exact = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    cudnn.benchmark = device == "cuda" and not exact


def _set_float32_precision(matmul: str, conv: str, rnn: str) -> None:
    cuda.matmul.fp32_precision = matmul
    cudnn.conv.fp32_precision = conv  # type: ignore[attr-defined]
    cudnn.rnn.fp32_precision = rnn  # type: ignore[attr-defined]


@contextmanager
def restored_backends() -> Iterator[None]:
    """Restore what `set_backends` sets, so that a run leaves no trace in the Python process that it is called from."""
    precisions = cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    earlier: list[tuple[Any, bool]] = []
    for backend in (cuda.matmul, cudnn):
        with suppress(RuntimeError):  # if the caller has set the newer switches only
            earlier.append((backend, backend.allow_tf32))
    benchmark = cudnn.benchmark
    try:
        yield
    finally:
        for switch, tf32 in earlier:
            switch.allow_tf32 = tf32
        _set_float32_precision(*precisions)
        cudnn.benchmark = benchmark
