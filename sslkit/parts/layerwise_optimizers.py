"""Optimizers with a learning rate for each layer: LARS as in MoCo v3, BYOL and SimCLR, LARC as in SwAV.

timm's Lars divides by ``|g| + wd * |p|``, unlike any of the three papers.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sslkit.distributed.collectives import sum_over_processes, upload
from sslkit.distributed.sharding import local_shard

ROW = 1024  # elements in a row of packed gradients; the last row of a layer is padded
# Reading a tensor is no wait there, and updates in three operations have the bits of runs before there was another way.
HOST_DEVICES = ("cpu",)


class _LayerwiseOptimizer(Optimizer):
    """SGD with momentum on gradients that are scaled layer by layer.

    The number of kernel launches does not depend on that of parameters. As for PyTorch's fused optimizers, two
    attributes may be set before `step`: ``found_inf``, a () float32 tensor on the device of the parameters, where 1
    means that nothing is to be updated (the host does not wait for it), and ``grad_scale``, a () tensor that divides
    the gradients.
    """

    _step_supports_amp_scaling = True
    rate_in_momentum = False

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._layers_of_rows: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("a closure is not supported; compute the gradients before step()")
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type in HOST_DEVICES and found_inf.item() == 1:
            return
        for group in self.param_groups:
            trained = [param for param in group["params"] if param.grad is not None]
            for dtype in dict.fromkeys(param.dtype for param in trained):
                self._update([param for param in trained if param.dtype == dtype], group, found_inf)

    def _update(self, trained: list[Tensor], group: dict[str, Any], found_inf: Tensor | None) -> None:
        """Update parameters of one dtype; of sharded ones, the shards of this process."""
        buffers = [self._momentum_buffer(param) for param in trained]
        grads = self.adapted(trained, _unscaled(trained, getattr(self, "grad_scale", None)), group)
        params = [local_shard(param) for param in trained]
        inside, outside = (group["lr"], 1.0) if self.rate_in_momentum else (1.0, group["lr"])
        if params[0].device.type in HOST_DEVICES:
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads, alpha=inside)
            torch._foreach_add_(params, buffers, alpha=-outside)
        else:
            grads = grads if inside == 1.0 else list(torch._foreach_mul(grads, inside))
            _fused_momentum_update(params, grads, buffers, group["momentum"], outside, found_inf)

    def _momentum_buffer(self, param: Tensor) -> Tensor:
        """The parameter's momentum buffer, or this process's shard of it; starts at zero."""
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        return local_shard(state["momentum_buffer"])

    def adapted(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """The gradients that enter the momentum; ``grads`` and they are this process's shards."""
        raise NotImplementedError

    def _pack(self, params: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Copy gradients to the rows of a matrix, so that factors of all layers are applied in one launch.

        PyTorch multiplies a list of tensors by a list of factors in as many launches. Returns the matrix (R, ROW), the
        layer of each row (R,), and each layer's part of the matrix in the layout of its momentum buffer.
        """
        counts = tuple(-(-grad.numel() // ROW) for grad in grads)
        key = (grads[0].device, counts)
        if key not in self._layers_of_rows:
            self._layers_of_rows[key] = upload(torch.from_numpy(np.repeat(np.arange(len(counts)), counts)), key[0])
        matrix = grads[0].new_empty((sum(counts), ROW))
        starts = accumulate(counts[:-1], initial=0)
        buffers = [self._momentum_buffer(param) for param in params]
        parts = [
            matrix.as_strided(buffer.size(), buffer.stride(), start * ROW)
            for buffer, start in zip(buffers, starts, strict=True)
        ]
        torch._foreach_copy_(parts, grads)
        return matrix, self._layers_of_rows[key], parts


def _unscaled(params: Sequence[Tensor], scale: Tensor | None) -> list[Tensor]:
    """Gradients divided by the loss scale, if there is one."""
    grads = [local_shard(param.grad) for param in params if param.grad is not None]
    if scale is None:
        return grads
    return list(torch._foreach_mul(grads, scale.double().reciprocal().to(grads[0].dtype)))


def _norms(params: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(N,) norms of parameters and of gradients, over all shards. ``grads`` are shards already."""
    norms = torch.stack(torch._foreach_norm([*map(local_shard, params), *grads]))
    if isinstance(params[0], DTensor):
        norms = sum_over_processes(norms.square()).sqrt()
    return norms[: len(params)], norms[len(params) :]


def _fused_momentum_update(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    momentum: float,
    lr: float,
    found_inf: Tensor | None,
) -> None:
    """``mu = momentum * mu + g; p -= lr * mu`` in place, in one pass over memory; nothing where ``found_inf`` is 1."""
    torch._fused_sgd_(
        params,
        grads,
        buffers,
        weight_decay=0.0,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=found_inf,
    )


class Lars(_LayerwiseOptimizer):
    """LARS (You et al., 2017, arXiv:1708.03888) as in the official code of MoCo v3 and BYOL.

    For tensors of more than one axis: ``g += wd * p``, then ``g *= eta * |p| / |g|`` (factor 1 where a norm is 0).
    Others (biases, norms), and groups with ``adapt = False``, get neither weight decay nor adaptation. Then
    ``mu = momentum * mu + g; p -= lr * mu``.

    Args:
        params: Parameters or groups.
        lr: Learning rate, applied after the momentum.
        weight_decay: Of tensors of more than one axis.
        momentum: Without Nesterov.
        eta: Trust coefficient.
        rate_in_momentum: SimCLR's form, ``mu = momentum * mu + lr * g; p -= mu``: the same while the rate stays.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
        *,
        rate_in_momentum: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})
        self.rate_in_momentum = rate_in_momentum

    def adapted(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """The gradients that enter the momentum."""
        result = list(grads)
        chosen = [index for index, param in enumerate(params) if param.ndim > 1] if group.get("adapt", True) else []
        if chosen:
            layers = [params[index] for index in chosen]
            matrix, layer_of_row, scaled = self._pack(layers, [grads[index] for index in chosen])
            torch._foreach_add_(scaled, list(map(local_shard, layers)), alpha=group["weight_decay"])
            param_norm, grad_norm = _norms(layers, scaled)
            trust = group["eta"] * param_norm / grad_norm
            factor = torch.where((param_norm > 0) & (grad_norm > 0), trust, torch.ones_like(trust))
            matrix.mul_(factor[layer_of_row, None])
            for index, grad in zip(chosen, scaled, strict=True):
                result[index] = grad
        return result


class Larc(_LayerwiseOptimizer):
    """SGD with momentum whose gradients apex's LARC has scaled, without clipping, as SwAV trains.

    ``g = (g + wd * p) * trust * |p| / (|g| + wd * |p| + eps)`` for **every** tensor, biases and norms too; where a
    norm is 0, g stays as it is, without weight decay. Then ``mu = momentum * mu + g; p -= lr * mu``.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        weight_decay: See above.
        momentum: Without Nesterov.
        trust: Trust coefficient.
        eps: Keeps the quotient finite.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust, "eps": eps}
        super().__init__(params, defaults)

    def adapted(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """The gradients that enter the momentum."""
        param_norm, grad_norm = _norms(params, grads)
        decay = group["weight_decay"]
        rate = group["trust"] * param_norm / (grad_norm + decay * param_norm + group["eps"])
        matrix, layer_of_row, scaled = self._pack(params, grads)
        plain = matrix.clone()
        torch._foreach_add_(scaled, list(map(local_shard, params)), alpha=decay)
        matrix.mul_(rate[layer_of_row, None])
        torch.where(((param_norm > 0) & (grad_norm > 0))[layer_of_row, None], matrix, plain, out=matrix)
        return scaled
