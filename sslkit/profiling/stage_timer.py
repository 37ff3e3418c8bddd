"""A stopwatch for the parts of a step, each counted without the parts inside it."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from sslkit.engine import step as step_module
from sslkit.engine.state import TrainingState

TRANSFER = "transfer, device views"
STUDENT = "student forward"
TEACHER = "teacher forward"
OBJECTIVE = "heads and loss"
BACKWARD = "backward"
COLLECTIVES = "collectives"
OPTIMIZER = "optimizer"
AFTER = "teacher's move, queue"
REST = "the rest"
STAGES = (TRANSFER, STUDENT, TEACHER, OBJECTIVE, BACKWARD, COLLECTIVES, OPTIMIZER, AFTER, REST)

# What `sslkit.distributed.collectives` calls. DDP's own reduction of gradients hides in the backward pass.
CALLS = ("all_reduce", "all_gather_into_tensor", "all_to_all_single", "broadcast")


class Stopwatch:
    """Seconds of each stage. A device is waited for at every boundary, so that its work counts where it was asked for.

    Attributes:
        seconds: Of each stage, without those entered within it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge what happens within to ``name``."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same function, its time charged to ``name``."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return call

    def _charge(self) -> None:
        wait_for(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def wait_for(device: torch.device) -> None:
    """Until what was asked of it is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def watched(training: TrainingState, watch: Stopwatch) -> Iterator[Stopwatch]:
    """Have the parts of ``training`` report to ``watch``, by what they are called through."""
    method, optimizer = training.method, training.optimizer
    parts: list[tuple[Any, str, str]] = [
        (method, "student", STUDENT),
        (method, "teacher", TEACHER),
        (method, "objective", OBJECTIVE),
        (method, "after_update", AFTER),
        (optimizer, "step", OPTIMIZER),
        (optimizer, "zero_grad", OPTIMIZER),
        (step_module, "finish_on", TRANSFER),
        (step_module, "forward_and_backward", BACKWARD),  # without the parts inside it
        *((dist, name, COLLECTIVES) for name in CALLS),
    ]
    whole = {(owner, name): getattr(owner, name) for owner, name, _ in parts}
    for owner, name, stage in parts:
        setattr(owner, name, watch.wrap(whole[owner, name], stage))
    try:
        yield watch
    finally:
        for owner, name, _ in parts:
            if isinstance(owner, ModuleType):
                setattr(owner, name, whole[owner, name])
            else:
                delattr(owner, name)  # the class has its own
