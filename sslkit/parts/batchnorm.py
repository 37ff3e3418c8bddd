"""BatchNorm over the global batch, on any device.

PyTorch's SyncBatchNorm refuses CPU tensors. The papers' heads need one, and tests on CPU processes must be able to
show that several processes equal one, so there is a plain version here; GPUs get PyTorch's own.
"""

from collections.abc import Collection

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslkit.parts.collectives import sum_with_gradient, world_size


class GlobalBatchNorm(nn.Module):
    """BatchNorm whose statistics are those of the rows of all processes together. Keeps the state-dict keys.

    Args:
        norm: The BatchNorm to stand in for; its parameters and buffers are shared, not copied. timm's
            BatchNormAct2d keeps its dropout and activation.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
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
        count = x.numel() // x.shape[1] * world_size()
        mean = sum_with_gradient(x.sum(dim=axes)) / count
        centred = x - mean.view(1, -1, *([1] * (x.ndim - 2)))
        var = sum_with_gradient(centred.square().sum(dim=axes)) / count
        with torch.no_grad():
            momentum = 0.1 if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean), momentum)
            self.running_var.lerp_((var * count / max(count - 1, 1)).to(self.running_var), momentum)
            self.num_batches_tracked.add_(1)
        return mean, var


def synchronise_batch_norm(module: nn.Module, device: torch.device, spare: Collection[str] = ()) -> nn.Module:
    """Replace every BatchNorm in ``module`` by one over the global batch; names and parameters stay.

    Args:
        module: Changed in place.
        device: GPUs get PyTorch's own, CPUs `GlobalBatchNorm`.
        spare: Names of children to leave as they are.
    """
    if isinstance(module, _BatchNorm):
        return convert_sync_batchnorm(module) if device.type == "cuda" else GlobalBatchNorm(module)
    for name, child in list(module.named_children()):
        if name not in spare:
            setattr(module, name, synchronise_batch_norm(child, device))
    return module


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any layer of ``module`` normalises by batch statistics."""
    return any(isinstance(layer, (_BatchNorm, GlobalBatchNorm)) for layer in module.modules())
