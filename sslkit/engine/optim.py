"""Optimizers with the papers' parameter groups, and the learning rate as a function of the step."""

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim import Optimizer

from sslkit.parts.schedules import per_epoch, warmup_then_cosine, warmup_then_steps
from sslkit.recipe import Recipe


class Lars(Optimizer):
    """LARS as MoCo v3's code has it (You et al., 2017, arXiv:1708.03888).

    For tensors of more than one axis: ``g += wd * p``, then ``g *= eta * |p| / |g|`` (factor 1 where a norm is 0).
    Others (biases, norms) get neither weight decay nor adaptation. Then ``mu = momentum * mu + g; p -= lr * mu``.
    timm's Lars divides by ``|g| + wd * |p|`` and so is another optimizer.

    Args:
        params: Parameters or groups.
        lr: Learning rate, applied after the momentum.
        weight_decay: Of tensors of more than one axis.
        momentum: Without Nesterov.
        eta: Trust coefficient.
    """

    def __init__(
        self, params: Any, lr: float, weight_decay: float = 0.0, momentum: float = 0.9, eta: float = 0.001
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise RuntimeError("Lars takes no closure")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        grad = param.grad
        assert grad is not None
        if param.ndim > 1:
            grad = grad.add(param, alpha=group["weight_decay"])
            param_norm, grad_norm = param.norm(), grad.norm()
            trust = group["eta"] * param_norm / grad_norm
            grad = grad * torch.where((param_norm > 0) & (grad_norm > 0), trust, torch.ones_like(trust))
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        buffer = state["momentum_buffer"]
        buffer.mul_(group["momentum"]).add_(grad)
        param.add_(buffer, alpha=-group["lr"])


def make_optimizer(recipe: Recipe, method: nn.Module) -> Optimizer:
    """The recipe's optimizer over everything in ``method`` that takes gradient; the teacher's tensors do not."""
    optim = recipe.optim
    groups = _parameter_groups(method, optim.weight_decay, optim.exclude_from_decay == "norm_and_bias")
    lr = recipe.peak_lr
    if optim.name == "lars":
        return Lars(groups, lr, optim.weight_decay, optim.momentum)
    if optim.name == "sgd":
        # timm's "sgd" is Nesterov's; the papers' is its "momentum".
        return create_optimizer_v2(groups, "momentum", lr, optim.weight_decay, optim.momentum)
    return create_optimizer_v2(groups, optim.name, lr, optim.weight_decay, betas=optim.betas)


def _parameter_groups(method: nn.Module, weight_decay: float, spare_vectors: bool) -> list[dict[str, Any]]:
    trained = [param for param in method.parameters() if param.requires_grad]
    if not spare_vectors:
        return [{"params": trained, "weight_decay": weight_decay}]
    return [
        {"params": [param for param in trained if param.ndim > 1], "weight_decay": weight_decay},
        {"params": [param for param in trained if param.ndim <= 1], "weight_decay": 0.0},
    ]


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The rate of update ``step`` (from 0), by the recipe's schedule; warm-up always moves with the step."""
    schedule = recipe.schedule
    epoch = step / steps_per_epoch
    if schedule.per == "epoch" and epoch >= schedule.warmup_epochs:
        epoch = max(per_epoch(epoch), schedule.warmup_epochs)
    if schedule.decay == "cosine":
        return warmup_then_cosine(epoch, recipe.train.epochs, schedule.warmup_epochs, recipe.peak_lr)
    milestones = schedule.milestones if schedule.decay == "steps" else []
    return warmup_then_steps(epoch, milestones, schedule.factor, schedule.warmup_epochs, recipe.peak_lr)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Write the rate into every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
