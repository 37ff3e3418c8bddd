"""The BatchNorm layer of a GPU: groups of rows in one pass, over several processes, without waiting for the device."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslkit.distributed.collectives import world_size
from sslkit.parts.batchnorm import chunk_kernels
from sslkit.parts.batchnorm.normalisation import Normalisation, batch_norm


class DeviceBatchNorm(_BatchNorm):
    """BatchNorm whose rows can be several groups, each with its own statistics. The state-dict keys stay the same.

    `start_pass` says how the rows of the next calls are divided. Without it they are one group.

    Args:
        norm: The BatchNorm to replace. Its parameters and buffers are shared, not copied. The dropout and activation of
            timm's BatchNormAct2d are kept.
        synchronised: Whether a group has rows on several processes.
        group: Those processes; None: all.
    """

    def __init__(self, norm: _BatchNorm, *, synchronised: bool = False, group: dist.ProcessGroup | None = None) -> None:
        nn.Module.__init__(self)
        self.num_features, self.eps, self.momentum = norm.num_features, norm.eps, norm.momentum
        self.affine, self.track_running_stats = norm.affine, norm.track_running_stats
        self.training = norm.training
        self.register_parameter("weight", norm.weight)
        self.register_parameter("bias", norm.bias)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())
        self.synchronised, self.group = synchronised, group
        self.groups = 1
        self.view_rows = 0
        self.uncounted: int | None = None

    def start_pass(self, groups: int) -> None:
        """Divide the rows of the next calls into ``groups`` contiguous equal groups; `add_batches` counts them."""
        self.groups, self.view_rows, self.uncounted = groups, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C) or (B, C, ...) over every axis but the channels, each group of rows by itself."""
        out: Tensor = self.act(self.drop(self._normalised(x)))
        return out

    def _normalised(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if not self.training:
            batch = mean is None and var is None
            return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, batch, 0.0, self.eps)
        views = max(len(x) // self.view_rows, 1) if self.view_rows else 1
        chunks, processes = views * self.groups, self._processes()
        if len(x) % chunks:
            raise ValueError(f"{len(x)} rows cannot be divided into {chunks} equal groups")
        if x.numel() // x.shape[1] * processes <= chunks:
            raise ValueError(f"a group needs more than one value per channel, got {len(x)} rows in {chunks} groups")
        counter = self.num_batches_tracked
        if not self.track_running_stats or mean is None or var is None or counter is None:
            return self._by_batch_statistics(x, (None, None, 0.0), chunks, views)
        self._count(counter, views)
        if self.momentum is not None:
            return self._by_batch_statistics(x, (mean, var, self.momentum), chunks, views)
        # The mean over all batches: the share of this one is known on the device only.
        batch_mean, batch_var = torch.zeros_like(mean), torch.zeros_like(var)
        out = self._by_batch_statistics(x, (batch_mean, batch_var, 1.0), chunks, views)
        share = 1.0 / counter.to(mean.dtype)
        mean.lerp_(batch_mean, share)
        var.lerp_(batch_var, share)
        return out

    def _by_batch_statistics(
        self, x: Tensor, running: tuple[Tensor | None, Tensor | None, float], chunks: int, views: int
    ) -> Tensor:
        mean, var, momentum = running
        processes = self._processes()
        if chunks == 1 and processes == 1:
            return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, True, momentum, self.eps)
        how = Normalisation(self.eps, momentum, self.group, processes, chunks, views)
        return batch_norm(x, self.weight, self.bias, mean, var, how)

    def _processes(self) -> int:
        if not self.synchronised:
            return 1
        return world_size() if self.group is None else dist.get_world_size(self.group)

    def _count(self, counter: Tensor, batches: int) -> None:
        # A launch a layer is saved by counting on the host; compiled code must not depend on a number that changes.
        if torch.compiler.is_compiling() or self.momentum is None or self.uncounted is None:
            counter.add_(batches)
        else:
            self.uncounted += batches


def device_norms(modules: Iterable[nn.Module]) -> list[DeviceBatchNorm]:
    """All layers of this kind."""
    return [layer for module in modules for layer in module.modules() if isinstance(layer, DeviceBatchNorm)]


def add_batches(layers: Iterable[DeviceBatchNorm]) -> None:
    """Add what the layers have counted since `DeviceBatchNorm.start_pass` to their ``num_batches_tracked``."""
    counted: dict[int, list[Tensor]] = {}
    for layer in layers:
        if layer.uncounted and layer.num_batches_tracked is not None:
            counted.setdefault(layer.uncounted, []).append(layer.num_batches_tracked)
            layer.uncounted = 0
    with torch.no_grad():
        for batches, counters in counted.items():
            torch._foreach_add_(counters, batches)


def can_divide(module: nn.Module) -> bool:
    """Whether BatchNorm in ``module`` takes several groups of rows in one pass: on GPUs."""
    kinds = {isinstance(layer, DeviceBatchNorm) for layer in module.modules() if isinstance(layer, _BatchNorm)}
    return kinds == {True} and chunk_kernels.available()


def shares_collectives(modules: Iterable[nn.Module]) -> bool:
    """Whether views that go through ``modules`` in one pass need fewer collectives than one after the other."""
    # The mean over all batches moves by another share at each view.
    layers = [layer for layer in device_norms(modules) if layer.training]
    steady = all(layer.momentum is not None for layer in layers)
    return chunk_kernels.available() and steady and any(layer.synchronised for layer in layers)
