"""The numbers of a training step: computed on the device, read by the host when they have arrived."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

METRIC, FLAG = "metric ", "flag "


@dataclass(frozen=True)
class NumbersRead:
    """The numbers on the host."""

    own: dict[str, float]  # loss, norm of the gradients and the like
    metrics: dict[str, float]  # the method's
    flags: tuple[bool, ...]  # whether any process raised each
    layers: dict[str, float]


class StepNumbers:
    """() tensors by name, read all at once.

    Args:
        shared: Equal on all processes: the loss, ``metric NAME`` for the method's, and ``flag N`` as shares of the
            processes that raised it.
        own: Others, such as the norm of the gradients.
        layers: Of each layer.
    """

    def __init__(self, shared: Mapping[str, Tensor], own: Mapping[str, Tensor], layers: Mapping[str, Tensor]) -> None:
        self.names = [*shared, *own, *layers]
        self.layers = frozenset(layers)
        values = [*shared.values(), *own.values(), *layers.values()]
        widest = max((value.dtype for value in values), key=lambda dtype: torch.finfo(dtype).bits)
        self.values = torch.stack([value.detach().to(widest) for value in values])
        self.arrived: torch.cuda.Event | None = None

    def start_download(self) -> None:
        """Begin to copy the numbers to the host, without waiting for a GPU to compute them."""
        if self.values.device.type == "cuda":
            self.values = torch.empty_like(self.values, device="cpu", pin_memory=True).copy_(
                self.values, non_blocking=True
            )
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> NumbersRead:
        """The numbers; waits until the device has computed them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        numbers = dict(zip(self.names, self.values.tolist(), strict=True))
        layers = {name: value for name, value in numbers.items() if name in self.layers}
        metrics = {name.removeprefix(METRIC): value for name, value in numbers.items() if name.startswith(METRIC)}
        flags = tuple(value > 0 for name, value in numbers.items() if name.startswith(FLAG))
        own = {name: value for name, value in numbers.items() if not name.startswith((METRIC, FLAG))}
        return NumbersRead({name: own[name] for name in own.keys() - layers.keys()}, metrics, flags, layers)
