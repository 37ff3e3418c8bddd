"""Measures the time of the stages of a training step, each without the stages inside it."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from sslkit.engine import step as step_module
from sslkit.engine.state import TrainingState

STUDENT, TEACHER, BACKWARD = "student forward", "teacher forward", "backward"
TRANSFER, OBJECTIVE, OPTIMIZER = "transfer, device views", "heads and loss", "optimizer"
COLLECTIVES, AFTER, REST = "collectives", "teacher's move, queue", "the rest"
STAGES = (TRANSFER, STUDENT, TEACHER, OBJECTIVE, BACKWARD, COLLECTIVES, OPTIMIZER, AFTER, REST)

# What `sslkit.distributed.collectives` calls. DDP reduces gradients during the backward pass.
CALLS = ("all_reduce", "all_gather_into_tensor", "all_to_all_single", "broadcast")


class StageTimer:
    """Seconds of each stage. It waits for the device at each boundary: work counts in the stage that started it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)  # of each stage, without the stages inside it
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside this context to stage ``name``."""
        self._add_time()
        self._open.append(name)
        try:
            yield
        finally:
            self._add_time()
            self._open.pop()

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same function, with its time added to stage ``name``."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return call

    def _add_time(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def timed(training: TrainingState, timer: StageTimer) -> Iterator[StageTimer]:
    """Measure the stages of training steps made inside this context, by wrapping the functions they call."""
    method, optimizer = training.method, training.optimizer
    parts: list[tuple[Any, str, str]] = [
        (method, "student", STUDENT),
        (method, "teacher", TEACHER),
        (method, "objective", OBJECTIVE),
        (method, "after_update", AFTER),
        (optimizer, "step", OPTIMIZER),
        (optimizer, "zero_grad", OPTIMIZER),
        (step_module, "finish_on", TRANSFER),
        (step_module, "forward_and_backward", BACKWARD),  # without the stages inside it
        *((dist, name, COLLECTIVES) for name in CALLS),
    ]
    with ExitStack() as wrapped:
        for owner, name, stage in parts:
            wrapped.enter_context(patch.object(owner, name, timer.wrap(getattr(owner, name), stage)))
        yield timer
