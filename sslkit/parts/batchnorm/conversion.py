"""Which BatchNorm layers a network has, and their replacement by layers for several groups and processes."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslkit.distributed.collectives import subgroup_of, world_size
from sslkit.parts.batchnorm.device_norm import DeviceBatchNorm
from sslkit.parts.batchnorm.global_norm import GlobalBatchNorm


def synchronise_batch_norm(
    module: nn.Module, device: torch.device, *, synchronised: bool = True, group: dist.ProcessGroup | None = None
) -> nn.Module:
    """Replace every BatchNorm in ``module`` by one over the rows of several processes. Names and parameters stay.

    Args:
        module: Changed in place, unless it is a BatchNorm itself.
        device: GPUs get `DeviceBatchNorm`, CPUs `GlobalBatchNorm`.
        synchronised: False leaves the processes apart: GPUs get the layer for its groups of rows, CPUs keep theirs.
        group: The processes; None: all.
    """
    if isinstance(module, _BatchNorm):
        if device.type == "cuda":
            return DeviceBatchNorm(module, synchronised=synchronised and world_size() > 1, group=group)
        return GlobalBatchNorm(module, group) if synchronised else module
    for name, child in list(module.named_children()):
        setattr(module, name, synchronise_batch_norm(child, device, synchronised=synchronised, group=group))
    return module


def synchronise_in_groups(
    module: nn.Module, device: torch.device, groups: Mapping[str, int], *, across_processes: bool
) -> None:
    """Compute every BatchNorm in ``module`` over the processes that share its group.

    Args:
        module: Changed in place.
        device: See `synchronise_batch_norm`.
        groups: Number of groups of the global batch with batch statistics of their own, by the name of a child;
            1 for all other children.
        across_processes: Whether a group may span processes. If not, each process is a group where there are more
            processes than groups.
    """
    several = world_size() > 1
    counts = {name: groups.get(name, 1) for name, _ in module.named_children()}
    shared = {
        count: subgroup_of(count) if across_processes and several else None
        for count in dict.fromkeys(counts.values())
        if count > 1
    }
    for name, count in counts.items():
        group = shared[count] if count > 1 else None
        together = several and (count <= 1 or group is not None)
        child = getattr(module, name)
        setattr(module, name, synchronise_batch_norm(child, device, synchronised=together, group=group))


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """The layers of ``module`` that can normalise by batch statistics."""
    return [layer for layer in module.modules() if isinstance(layer, (_BatchNorm, GlobalBatchNorm))]


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any layer of ``module`` can normalise by batch statistics."""
    return bool(batch_norms(module))
