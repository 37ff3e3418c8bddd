"""The running statistics of a step in which BatchNorm sees the batch in several groups."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslkit.distributed.collectives import average_later, average_tensors, world_size
from sslkit.parts.batchnorm.device_norm import add_batches, device_norms
from sslkit.parts.batchnorm.global_norm import GlobalBatchNorm


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
        slices: Number of passes through them.
        groups: Number of groups in each pass, which have one update already; more than one needs `can_divide`.
        average: Whether processes have groups of their own, so that their statistics are averaged.
    """

    def __init__(self, modules: Sequence[nn.Module], slices: int, *, groups: int = 1, average: bool = True) -> None:
        self.slices, self.groups = slices, groups
        self.average = average and world_size() > 1
        self.layers = device_norms(modules)
        several = slices > 1 or self.average
        buffers = [
            # `.data`: autograd has saved these tensors and would refuse them changed, though it does not read them.
            buffer.data
            for module in (modules if several else ())
            for layer in module.modules()
            if isinstance(layer, (_BatchNorm, GlobalBatchNorm)) and layer.training
            for buffer in layer.buffers(recurse=False)
        ]
        self.statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
        self.counts = [buffer for buffer in buffers if not buffer.is_floating_point()]
        self.before: list[Tensor] = []
        self.counts_before: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.seen = 0

    @torch.no_grad()
    def start_slice(self) -> None:
        """Reset the statistics to those before the step. Call before each pass."""
        for layer in self.layers:
            layer.start_pass(self.groups)
        if self.slices == 1 or not self.statistics:
            return
        if not self.seen:
            self.before = _copies(self.statistics)
            self.counts_before = _copies(self.counts)
        else:
            torch._foreach_copy_(self.statistics, self.before)
            torch._foreach_copy_(self.counts, self.counts_before)

    @torch.no_grad()
    def end_slice(self) -> None:
        """Add up the statistics after a pass. Call after each pass."""
        add_batches(self.layers)
        if self.slices == 1 or not self.statistics:
            return
        self.seen += 1
        if self.seen == 1:
            self.sums = _copies(self.statistics)
        else:
            torch._foreach_add_(self.sums, self.statistics)

    @torch.no_grad()
    def finish(self) -> None:
        """Set the statistics to the mean over all groups of all processes. Call after the last pass."""
        if not self.statistics:
            return
        if self.slices > 1:
            torch._foreach_div_(self.sums, self.slices)
            torch._foreach_copy_(self.statistics, self.sums)
        if self.average:
            # On a GPU the average travels with the step's loss; on a CPU it keeps the order of its sums.
            on_cpu = self.statistics[0].device.type == "cpu"
            (average_tensors if on_cpu else average_later)(self.statistics)


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Clones, in one launch."""
    return list(torch._foreach_mul(tensors, 1))
