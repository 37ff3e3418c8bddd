"""Build a timm model on the meta device, within limits, before it takes memory."""

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from sslkit.errors import UserError

Shapes = dict[str, tuple[int, ...]]

# In timm 1.0.31, parameters and buffers of all models have at most 1.3 times the elements of their weights, and there
# are at most 1.3 times as many of them, and 3.3 modules per tensor. The file or the model may lack the classifier.
HEADROOM = 2.0
EXTRA_PARAMETERS, EXTRA_BUFFERS = 1_000_000, 16_000_000  # elements allowed for any file
EXTRA_TENSORS, MODULES_PER_TENSOR = 1000, 10


@dataclass(frozen=True)
class Bounds:
    """Limits of a model: elements of its parameters and of its buffers, number of tensors and of modules.

    ``buffers`` also limits each tensor that is computed while the model is built.
    """

    parameters: int
    buffers: int
    tensors: int
    modules: int

    @staticmethod
    def of_weights(shapes: Mapping[str, tuple[int, ...]]) -> "Bounds":
        """The limits of a model with weights of these shapes."""
        elements = int(HEADROOM * sum(map(math.prod, shapes.values())))
        tensors = int(HEADROOM * len(shapes)) + EXTRA_TENSORS
        return Bounds(elements + EXTRA_PARAMETERS, elements + EXTRA_BUFFERS, tensors, MODULES_PER_TENSOR * tensors)


UNBOUNDED = Bounds(sys.maxsize, sys.maxsize, sys.maxsize, sys.maxsize)  # for timm's models with default arguments


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    """The shapes of tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def build_on_meta(architecture: str, model_args: Mapping[str, Any], bounds: Bounds) -> nn.Module:
    """Build a timm model on the meta device; raises `UserError` if it exceeds the limits, and timm's own errors."""
    with torch.device("meta"), _bounded_modules(bounds), _BoundedTensors(bounds.buffers):
        model: nn.Module = timm.create_model(architecture, **model_args)
    return model


class _BoundedTensors(TorchDispatchMode):
    """Raise for every new tensor with too many elements, whether or not the model keeps it."""

    def __init__(self, elements: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.numel() > self.elements:
                raise UserError(f"it computes a tensor of {tensor.numel()} elements, far more than its weights have")
        return result


@contextmanager
def _bounded_modules(bounds: Bounds) -> Iterator[None]:
    """Raise while a model is built as soon as it exceeds the limits."""
    counts = Counter[str]()

    def add(kind: str, count: int) -> None:
        counts[kind] += count
        if counts[kind] > getattr(bounds, kind):
            raise UserError(f"it has more {kind} than its weights need")

    def add_tensor(kind: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            add("tensors", 1)
            add(kind, tensor.numel())

    with (
        register_module_parameter_registration_hook(lambda _module, _name, tensor: add_tensor("parameters", tensor)),
        register_module_buffer_registration_hook(lambda _module, _name, tensor: add_tensor("buffers", tensor)),
        register_module_module_registration_hook(lambda _module, _name, _child: add("modules", 1)),
    ):
        yield
