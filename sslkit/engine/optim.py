"""Optimizers with the papers' parameter groups, and the learning rate as a function of the step."""

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import SGD, Optimizer

from sslkit.parts.layerwise_optimizers import Larc, Lars
from sslkit.parts.schedules import per_epoch, warmup_then_cosine, warmup_then_steps
from sslkit.recipe.resolve import Recipe


def make_optimizer(recipe: Recipe, method: nn.Module) -> Optimizer:
    """The recipe's optimizer over everything in ``method`` that takes gradient; the teacher's tensors do not."""
    optim = recipe.optim
    groups = _parameter_groups(method, optim.weight_decay, optim.exclude_from_decay == "norm_and_bias")
    lr = recipe.peak_lr
    if optim.name in ("lars", "lars_simclr"):
        return Lars(groups, lr, optim.weight_decay, optim.momentum, rate_in_momentum=optim.name == "lars_simclr")
    if optim.name == "larc":
        return Larc(groups, lr, optim.weight_decay, optim.momentum)
    if optim.name == "sgd":
        # timm's "sgd" is Nesterov's; the papers' is its "momentum".
        fused = _fused(recipe, method)
        sgd = create_optimizer_v2(groups, "momentum", lr, optim.weight_decay, optim.momentum, fused=fused)
        begin_momenta(sgd)
        return sgd
    options: dict[str, Any] = {"fused": _fused(recipe, method)} if optim.name == "adamw" else {}
    return create_optimizer_v2(groups, optim.name, lr, optim.weight_decay, betas=optim.betas, **options)


def begin_momenta(optimizer: Optimizer) -> None:
    """Give every parameter of a fused SGD the zero that a momentum begins with.

    PyTorch's fused update cannot take a parameter that learns later than others: SwAV's prototypes, a backbone that
    rests.
    """
    if isinstance(optimizer, SGD) and optimizer.defaults.get("fused"):
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            optimizer.state[param].setdefault("momentum_buffer", torch.zeros_like(param))


def _fused(recipe: Recipe, method: nn.Module) -> bool | None:
    """Whether PyTorch updates a parameter in one pass over memory, not in one for each operation.

    Not beside a gradient scaler, whose overflow a fused update skips without a word to `AcceleratedOptimizer`.
    """
    where = {param.device.type for param in method.parameters()}
    return True if where <= {"cpu", "cuda"} and recipe.train.precision != "fp16" else None


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
    schedule, peak = recipe.schedule, recipe.peak_lr
    start, rise = schedule.warmup_start * peak, schedule.warmup_epochs
    epoch = step / steps_per_epoch
    if schedule.per == "epoch" and epoch >= rise:
        epoch = max(per_epoch(epoch), rise)
    if schedule.decay == "cosine":
        return warmup_then_cosine(epoch, recipe.train.epochs, rise, peak, start, schedule.final * peak)
    milestones = schedule.milestones if schedule.decay == "steps" else []
    return warmup_then_steps(epoch, milestones, schedule.factor, rise, peak, start)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Write the rate into every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
