"""Pieces shared by the naive training loops: one optimizer step, and the state dict of several modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
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


@contextmanager
def one_update_of_statistics(net: nn.Module, groups: int) -> Iterator[None]:
    """Lets the running statistics move once for each call that a group makes, by the mean over the groups.

    Every group must make the same calls, one group after the other. The mean and the unbiased variance of each call's
    input are written down and the update ``running = 0.9 running + 0.1 mean over groups`` is made by hand at the end.

    Args:
        net: Whose BatchNorm layers are called within.
        groups: How many groups pass through it.

    Yields:
        Nothing.
    """
    layers = [layer for layer in net.modules() if isinstance(layer, _BatchNorm)]
    before = [[buffer.clone() for buffer in layer.buffers(recurse=False)] for layer in layers]
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]

    def watch(calls: list[tuple[Tensor, Tensor]], x: Tensor) -> None:
        rows = x.detach().transpose(0, 1).flatten(1)
        calls.append((rows.mean(dim=1), rows.var(dim=1, unbiased=True)))

    hooks = [
        layer.register_forward_pre_hook(lambda _layer, inputs, calls=calls: watch(calls, inputs[0]))
        for layer, calls in zip(layers, seen, strict=True)
    ]
    yield
    for hook in hooks:
        hook.remove()
    for layer, (mean, var, count), calls in zip(layers, before, seen, strict=True):
        each = len(calls) // groups
        for call in range(each):
            of_groups = [calls[group * each + call] for group in range(groups)]
            mean = 0.9 * mean + 0.1 * torch.stack([m for m, _ in of_groups]).mean(dim=0)
            var = 0.9 * var + 0.1 * torch.stack([v for _, v in of_groups]).mean(dim=0)
        for name, value in (("running_mean", mean), ("running_var", var), ("num_batches_tracked", count + each)):
            getattr(layer, name).data.copy_(value)
