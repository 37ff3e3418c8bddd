"""BatchNorm over the global batch, or over groups of it, on any device and any number of processes.

PyTorch's SyncBatchNorm refuses CPU tensors, so there is a plain version for CPUs. GPUs use PyTorch's own.
"""

from collections.abc import Collection, Iterable, Mapping

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslkit.distributed.collectives import average_tensors, subgroup_of, sum_with_gradient, world_size


class GlobalBatchNorm(nn.Module):
    """BatchNorm whose statistics are those of the rows of several processes. The state-dict keys stay the same.

    Args:
        norm: The BatchNorm to replace. Its parameters and buffers are shared, not copied. The dropout and
            activation of timm's BatchNormAct2d are kept.
        group: The processes; None: all.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: _BatchNorm, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.eps, self.momentum = norm.eps, norm.momentum
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C) or (B, C, H, W) over every axis but the channels, on all processes."""
        shape = (1, -1, *([1] * (x.ndim - 2)))
        if self.training:
            mean, var = self._global_statistics(x)
        else:
            mean, var = self.running_mean, self.running_var
        work = torch.promote_types(x.dtype, torch.float32)
        scale = torch.rsqrt(var + self.eps)
        y = (x.to(work) - mean.to(work).view(shape)) * scale.to(work).view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        out: Tensor = self.act(self.drop(y.to(x.dtype)))
        return out

    def _global_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        x = x.double()  # as PyTorch's own CPU BatchNorm accumulates
        processes = dist.get_world_size(self.group) if self.group is not None else world_size()
        count = x.numel() // x.shape[1] * processes
        mean = sum_with_gradient(x.sum(dim=axes), self.group) / count
        centred = x - mean.view(1, -1, *([1] * (x.ndim - 2)))
        var = sum_with_gradient(centred.square().sum(dim=axes), self.group) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            # For PyTorch None means the mean over all batches so far.
            share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean), share)
            self.running_var.lerp_((var * count / max(count - 1, 1)).to(self.running_var), share)
        return mean, var


def synchronise_batch_norm(
    module: nn.Module, device: torch.device, skip: Collection[str] = (), group: dist.ProcessGroup | None = None
) -> nn.Module:
    """Replace every BatchNorm in ``module`` by one over the rows of several processes. Names and parameters stay.

    Args:
        module: Changed in place.
        device: GPUs get PyTorch's SyncBatchNorm, CPUs `GlobalBatchNorm`.
        skip: Names of children to leave as they are.
        group: The processes; None: all.
    """
    if isinstance(module, _BatchNorm):
        return convert_sync_batchnorm(module, group) if device.type == "cuda" else GlobalBatchNorm(module, group)
    for name, child in list(module.named_children()):
        if name not in skip:
            setattr(module, name, synchronise_batch_norm(child, device, group=group))
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
    grouped = {name: count for name, count in groups.items() if count > 1 and hasattr(module, name)}
    synchronise_batch_norm(module, device, skip=grouped)
    if not across_processes:
        return
    shared = {count: subgroup_of(count) for count in dict.fromkeys(grouped.values())}
    for name, count in grouped.items():
        if shared[count] is not None:
            setattr(module, name, synchronise_batch_norm(getattr(module, name), device, group=shared[count]))


class GroupStatistics:
    """Makes one update of the running statistics from several groups of a batch: the mean of the groups' updates.

    Each group passes through the network by itself. BatchNorm alone would update its running statistics once for every
    group, with an effective momentum of ``1 - (1 - m) ** groups``, and each process would keep its own. Here every
    group starts from the statistics before the step, and the results are averaged over groups and processes. An update
    is linear in the batch's mean and variance, so this is the update by their means over the groups. (In the papers'
    runs every GPU is a group with running statistics of its own, and the first GPU's are saved. Their mean over the
    GPUs moves as here.)

    Training normalises by batch statistics and does not change.

    Args:
        modules: Whose BatchNorm layers are in training mode during the step.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        buffers = [
            # `.data`: autograd has saved these tensors and would refuse them changed, though it does not read them.
            buffer.data
            for module in modules
            for layer in module.modules()
            if isinstance(layer, (_BatchNorm, GlobalBatchNorm)) and layer.training
            for buffer in layer.buffers(recurse=False)
        ]
        self.statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
        self.counts = [buffer for buffer in buffers if not buffer.is_floating_point()]
        self.before: list[Tensor] = []
        self.counts_before: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.groups = 0

    @torch.no_grad()
    def start_group(self) -> None:
        """Reset the statistics to those before the step. Call before each group."""
        if not self.statistics:
            return
        if not self.groups:
            self.before = [tensor.clone() for tensor in self.statistics]
            self.counts_before = [tensor.clone() for tensor in self.counts]
        else:
            torch._foreach_copy_(self.statistics, self.before)
            torch._foreach_copy_(self.counts, self.counts_before)

    @torch.no_grad()
    def end_group(self) -> None:
        """Add up the statistics after a group. Call after each group."""
        if not self.statistics:
            return
        self.groups += 1
        if self.groups == 1:
            self.sums = [tensor.clone() for tensor in self.statistics]
        else:
            torch._foreach_add_(self.sums, self.statistics)

    @torch.no_grad()
    def finish(self) -> None:
        """Set the statistics to the mean over all groups of all processes. Call after the last group."""
        if self.groups > 1:
            torch._foreach_div_(self.sums, self.groups)
        average_tensors(self.sums)
        if self.sums:
            torch._foreach_copy_(self.statistics, self.sums)


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """The layers of ``module`` that can normalise by batch statistics."""
    return [layer for layer in module.modules() if isinstance(layer, (_BatchNorm, GlobalBatchNorm))]


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any layer of ``module`` can normalise by batch statistics."""
    return bool(batch_norms(module))
