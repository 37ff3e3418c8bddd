"""Build a timm model on the meta device, within bounds, to see how large it would be before it takes memory."""

import math
import sys
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

# All timm models stay below 1.3 times their weights in parameters and buffers, 1.3 times their number of tensors, and
# 3.3 modules for a tensor (timm 1.0.31). A classifier may stand in the file or the model and not in the other.
HEADROOM = 2.0
SMALL_PARAMETERS, SMALL_BUFFERS = 1_000_000, 16_000_000  # elements that a model may have whatever its file holds
SMALL_TENSORS, MODULES_OF_TENSOR = 1000, 10


@dataclass(frozen=True)
class Bounds:
    """What a model may have at most.

    Attributes:
        parameters: Elements of all parameters.
        buffers: Elements of all buffers, and of any one tensor that is computed on the way.
        tensors: Number of parameters and buffers.
        modules: Number of submodules.
    """

    parameters: int
    buffers: int
    tensors: int
    modules: int

    @staticmethod
    def of_weights(shapes: Mapping[str, tuple[int, ...]]) -> "Bounds":
        """What a model whose weights have these shapes needs at most."""
        elements = int(HEADROOM * sum(map(math.prod, shapes.values())))
        tensors = int(HEADROOM * len(shapes)) + SMALL_TENSORS
        return Bounds(elements + SMALL_PARAMETERS, elements + SMALL_BUFFERS, tensors, MODULES_OF_TENSOR * tensors)


UNBOUNDED = Bounds(sys.maxsize, sys.maxsize, sys.maxsize, sys.maxsize)  # for timm's own models, by their names alone


def build_on_meta(architecture: str, model_args: Mapping[str, Any], bounds: Bounds) -> nn.Module:
    """The model as timm builds it, without memory for its tensors.

    Raises:
        UserError: It exceeds ``bounds``.
        Exception: Whatever timm raises for arguments that do not fit.
    """
    with torch.device("meta"), _counted(bounds), _BoundedTensors(bounds.buffers):
        model: nn.Module = timm.create_model(architecture, **model_args)
    return model


class _BoundedTensors(TorchDispatchMode):
    """Stop at a tensor of more than so many elements, whether the model keeps it or not."""

    def __init__(self, elements: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.numel() > self.elements:
                raise UserError(f"it computes a tensor of {tensor.numel()} elements, far more than its weights hold")
        return made


@contextmanager
def _counted(bounds: Bounds) -> Iterator[None]:
    """Stop a model that is being built when it has more than ``bounds``."""
    counts = {"parameters": 0, "buffers": 0, "tensors": 0, "modules": 0}

    def add(kind: str, count: int) -> None:
        counts[kind] += count
        if counts[kind] > getattr(bounds, kind):
            raise UserError(f"it has more {kind} than the weights beside it need")

    def add_tensor(kind: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            add("tensors", 1)
            add(kind, tensor.numel())

    handles = [
        register_module_parameter_registration_hook(lambda _module, _name, tensor: add_tensor("parameters", tensor)),
        register_module_buffer_registration_hook(lambda _module, _name, tensor: add_tensor("buffers", tensor)),
        register_module_module_registration_hook(lambda _module, _name, _child: add("modules", 1)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
