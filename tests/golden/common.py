"""Pieces shared by the naive training loops: one optimizer step, and the state dict of several modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]


def copied_student(**modules: nn.Module) -> nn.ModuleDict:
    """Copies modules into one dictionary in train mode; the originals are left alone.

    Args:
        **modules: Modules by name; the names become the prefixes of the state dict.

    Returns:
        The copies. Parameters that do not require a gradient stay that way.
    """
    return nn.ModuleDict({name: copy.deepcopy(module) for name, module in modules.items()}).train()


def trainable(net: nn.Module) -> list[nn.Parameter]:
    """Lists the parameters that require a gradient, in module order.

    Args:
        net: Any module.

    Returns:
        The parameters an optimizer gets.
    """
    return [p for p in net.parameters() if p.requires_grad]


def gradient_step(optimizer: Optimizer, loss: Tensor, lr: float, held: Iterable[nn.Parameter] = ()) -> None:
    """Runs backward and one optimizer step at a given learning rate.

    Args:
        optimizer: Optimizer of the student.
        loss: Scalar loss.
        lr: Learning rate of this step, for every parameter group.
        held: Parameters whose gradient is dropped, so that the optimizer skips them altogether.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    for p in held:
        p.grad = None
    optimizer.step()


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """Snapshots a state dict.

    Args:
        net: Any module.

    Returns:
        Name to detached copy.
    """
    return {name: value.detach().clone() for name, value in net.state_dict().items()}
