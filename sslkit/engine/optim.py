"""Optimizers with the papers' parameter groups, and the schedules of learning rate and weight decay."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import SGD, Optimizer

from sslkit.methods import Method, Multipliers
from sslkit.parts.adaptation.trained_layers import rate_multipliers
from sslkit.parts.layerwise_optimizers import Larc, Lars
from sslkit.parts.schedules import Progress, cosine, per_epoch, warmup_then_cosine, warmup_then_steps
from sslkit.recipe.resolve import Recipe

OPTIMIZER_COPIES = {"sgd": 1, "lars": 1, "lars_simclr": 1, "larc": 1, "adamw": 2, "lamb": 2}  # of the trained weights


def make_optimizer(recipe: Recipe, method: Method) -> Optimizer:
    """The recipe's optimizer over all parameters of ``method`` that require gradient; a teacher's do not."""
    optim = recipe.optim
    scales = rate_multipliers(method.backbone, recipe.adapt.layer_decay) if recipe.adapt.layer_decay < 1.0 else {}
    exempt_vectors = optim.exclude_from_decay == "norm_and_bias"
    groups = _parameter_groups(method, optim.weight_decay, exempt_vectors, scales)
    lr = recipe.peak_lr
    if optim.name in ("lars", "lars_simclr"):
        return Lars(groups, lr, optim.weight_decay, optim.momentum, rate_in_momentum=optim.name == "lars_simclr")
    if optim.name == "larc":
        return Larc(groups, lr, optim.weight_decay, optim.momentum)
    if optim.name == "sgd":
        # timm's "sgd" uses Nesterov momentum; the papers' SGD is its "momentum".
        sgd = create_optimizer_v2(groups, "momentum", lr, optim.weight_decay, optim.momentum, fused=_fused(method))
        init_momentum_buffers(sgd)
        return sgd
    options: dict[str, Any] = {"fused": _fused(method)} if optim.name == "adamw" else {}
    return create_optimizer_v2(groups, optim.name, lr, optim.weight_decay, betas=optim.betas, **options)


def init_momentum_buffers(optimizer: Optimizer) -> None:
    """Start the momentum of every parameter of a fused SGD at zero.

    PyTorch's fused update cannot handle parameters of which some get their first gradient later than others: SwAV's
    prototypes, or a backbone that is frozen at first.
    """
    if isinstance(optimizer, SGD) and optimizer.defaults.get("fused"):
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            optimizer.state[param].setdefault("momentum_buffer", torch.zeros_like(param))


def _fused(method: nn.Module) -> bool | None:
    """Whether to update a parameter in one pass over memory instead of one for each operation."""
    return True if {param.device.type for param in method.parameters()} <= {"cpu", "cuda"} else None


def supports_found_inf(optimizer: Optimizer) -> bool:
    """Whether `Optimizer.step` updates nothing if the attribute ``found_inf``, a () tensor on the device, is 1.

    Such an update needs no answer from the device. True of PyTorch's fused SGD and AdamW, and of LARS and LARC; not of
    timm's LAMB. ``optimizer`` may be wrapped by Accelerate.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    return bool(getattr(inner, "_step_supports_amp_scaling", False))


def _parameter_groups(
    method: Method, weight_decay: float, exempt_vectors: bool, scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Groups of parameters that share the method's multipliers and, if vectors have no weight decay, their kind.

    ``scales`` are further multipliers on the learning rate, by the name of a parameter of the backbone.
    """
    declared = method.param_groups()
    groups: dict[tuple[str, bool, float], list[nn.Parameter]] = {}
    for name, param in method.named_parameters():
        if param.requires_grad:
            modules = [each for each in declared if f"{name}.".startswith(f"{each}.")]
            exempt = exempt_vectors and param.ndim <= 1
            scale = scales.get(name.removeprefix("backbone."), 1.0) if name.startswith("backbone.") else 1.0
            groups.setdefault((max(modules, key=len, default=""), exempt, scale), []).append(param)
    result = []
    for (module, exempt, scale), params in sorted(groups.items(), key=lambda group: group[0]):
        factors = declared.get(module, Multipliers())
        decay = 0.0 if exempt else factors.weight_decay
        result.append({"params": params, "weight_decay": weight_decay * decay})
        result[-1] |= {"lr_multiplier": factors.lr * scale, "weight_decay_multiplier": decay}
    return result


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of step ``step`` (from 0) by the recipe's schedule; during warm-up it changes at every step."""
    schedule, peak = recipe.schedule, recipe.peak_lr
    start, warmup = schedule.warmup_start * peak, schedule.warmup_epochs
    epoch = step / steps_per_epoch
    if schedule.per == "epoch" and epoch >= warmup:
        epoch = max(per_epoch(epoch), warmup)
    if schedule.decay == "cosine":
        return warmup_then_cosine(epoch, recipe.train.epochs, warmup, peak, start, schedule.final * peak)
    milestones = schedule.milestones if schedule.decay == "steps" else []
    return warmup_then_steps(epoch, milestones, schedule.factor, warmup, peak, start)


def weight_decay(recipe: Recipe, progress: Progress) -> float:
    """The weight decay by the recipe's schedule: constant, or half a cosine to ``[schedule] weight_decay_end``."""
    start, end = recipe.optim.weight_decay, recipe.schedule.weight_decay_end
    return start if end is None else cosine(progress.updates, progress.total_updates, start, end)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, times the group's multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]


def set_weight_decay(optimizer: Optimizer, weight_decay: float) -> None:
    """Set the weight decay of every parameter group, times the group's multiplier."""
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay * group["weight_decay_multiplier"]
