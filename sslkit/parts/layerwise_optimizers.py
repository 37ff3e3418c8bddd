"""Optimizers with a learning rate for each layer: LARS as in MoCo v3, BYOL and SimCLR, LARC as in SwAV.

timm's Lars divides by ``|g| + wd * |p|``, unlike any of the three papers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class _LayerwiseOptimizer(Optimizer):
    """Calls `update` on every parameter that has a gradient."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("a closure is not supported; compute the gradients before step()")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, param.grad, group)

    def update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter."""
        raise NotImplementedError

    def momentum_buffer(self, param: Tensor) -> Tensor:
        """The parameter's momentum buffer; starts at zero."""
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


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

    def update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter."""
        if param.ndim > 1 and group.get("adapt", True):
            grad = grad.add(param, alpha=group["weight_decay"])
            param_norm, grad_norm = param.norm(), grad.norm()
            trust = group["eta"] * param_norm / grad_norm
            grad = grad * torch.where((param_norm > 0) & (grad_norm > 0), trust, torch.ones_like(trust))
        buffer = self.momentum_buffer(param)
        inside, outside = (group["lr"], 1.0) if self.rate_in_momentum else (1.0, group["lr"])
        buffer.mul_(group["momentum"]).add_(grad, alpha=inside)
        param.add_(buffer, alpha=-outside)


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

    def update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter."""
        param_norm, grad_norm = param.norm(), grad.norm()
        decay = group["weight_decay"]
        rate = group["trust"] * param_norm / (grad_norm + decay * param_norm + group["eps"])
        scaled = grad.add(param, alpha=decay) * rate
        grad = torch.where((param_norm > 0) & (grad_norm > 0), scaled, grad)
        buffer = self.momentum_buffer(param)
        buffer.mul_(group["momentum"]).add_(grad)
        param.add_(buffer, alpha=-group["lr"])
