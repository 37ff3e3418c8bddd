"""``[train] compile``: which modules `torch.compile` compiles, and how long the steps take in which it does."""

import time
from collections.abc import Callable

import torch
from torch import nn

from sslkit.errors import UserError
from sslkit.text import format_duration, pluralize

REPEATED = ("blocks", "stages", "layers", "layer1", "layer2", "layer3", "layer4")  # timm's names for lists of layers
# Compiled versions of one piece of code: by shape of the weights, mode, and with or without gradient.
MAX_VERSIONS = 256


def compile_encoders(encoders: list[nn.Module], how: bool | str, name: str) -> None:
    """Compile encoders, each as a whole or, if ``how`` is ``"blocks"``, each of its blocks.

    In place: modules and parameters keep their names. Blocks with the same code and shapes are compiled once.

    Args:
        encoders: Student and teacher.
        how: ``[train] compile``.
        name: Of the model in timm, for the message.

    Raises:
        UserError: The model has no blocks that can be compiled one by one.
    """
    if not how:
        return
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MAX_VERSIONS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * MAX_VERSIONS)
    for encoder in encoders:
        regions = blocks_of(encoder) if how == "blocks" else [encoder]
        if not regions:
            raise UserError(f"[train] compile: {name!r} has no {', '.join(REPEATED[:3])} to compile; set it to true")
        for region in regions:
            region.compile()


def blocks_of(encoder: nn.Module) -> list[nn.Module]:
    """The elements of timm's lists of layers: transformer blocks, or a ResNet's bottlenecks."""
    lists = [getattr(encoder, name, None) for name in REPEATED]
    return [block for each in lists if isinstance(each, nn.Sequential | nn.ModuleList) for block in each]


class WarmUp:
    """Finds the first steps, in which `torch.compile` was at work, and reports how long they took.

    Args:
        how: ``[train] compile``; there is nothing to find if it is False.
        log_message: Called once, after the first step without compilation.
    """

    def __init__(self, how: bool | str, log_message: Callable[[str], None]) -> None:
        self.log_message, self.over = log_message, not how
        self.graphs = 0 if self.over else _graphs()
        self.steps, self.seconds, self.started = 0, 0.0, time.monotonic()

    def after_step(self) -> bool:
        """Whether this step compiled something, so that its time says nothing about the speed of others."""
        if self.over:
            return False
        now, graphs = time.monotonic(), _graphs()
        if graphs > self.graphs:
            self.graphs, self.steps, self.seconds = graphs, self.steps + 1, now - self.started
            return True
        self.over = True
        first = "the first step" if self.steps == 1 else f"the first {pluralize(self.steps, 'step')}"
        took = f"took {format_duration(self.seconds)}, which the speed does not count"
        self.log_message(f"compiled: {first} {took}" if self.steps else "compiled: nothing")
        return False


def _graphs() -> int:
    """Number of graphs that `torch.compile` has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
