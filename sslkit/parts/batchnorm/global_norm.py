"""BatchNorm over the rows of several processes, written in plain operators, for CPUs.

PyTorch's SyncBatchNorm refuses CPU tensors. GPUs have `device_norm`.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslkit.distributed.collectives import sum_with_gradient, world_size


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
