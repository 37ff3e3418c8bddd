"""Numbers that go wrong: which steps must not reach the weights, and what a run remembers of them.

Loss and gradient norm are equal on all processes, so all judge alike without another word between them.
"""

import math
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sslkit.errors import RunError, UserError
from sslkit.parts.batchnorm import GlobalBatchNorm
from sslkit.recipe.schema import GuardConfig

MOST = 1_000_000  # troubles of a kind
MAX_STEP = 2**53
WINDOW, FEWEST = 50, 20  # losses whose median tells a spike, and how many there must be


class BadStepError(RunError):
    """A step's numbers are bad; the weights are those of the last good step."""


class RewindError(BadStepError):
    """Too many bad steps in a row: the run must go back to its last checkpoint."""


@dataclass
class Course:
    """What must be known to go on exactly, beyond tensors; part of every checkpoint.

    Attributes:
        skipped: Bad steps in a row, up to now.
        rewinds: How often the run went back; each time it takes the images in another order from there.
        lr_factor: What that made of the learning rate.
        losses: Of the latest good steps.
        back_to: Step of the checkpoint that the run would go back to; 0 is its start, None says that there is none.
            See `sslkit.engine.resilience.rewind`.
    """

    skipped: int = 0
    rewinds: int = 0
    lr_factor: float = 1.0
    back_to: int | None = 0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def as_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {**vars(self), "losses": list(self.losses)}

    @staticmethod
    def from_json(fields: Any) -> "Course":
        """What `as_json` gave; a checkpoint from before there was a course has none.

        Raises:
            UserError: It cannot have been; the sentence goes on from the file's name.
        """
        if not isinstance(fields, dict):
            raise UserError(f"course must be an object, not {fields!r:.50}")
        right: dict[str, Callable[[Any], bool]] = {
            "skipped": _is_count,
            "rewinds": _is_count,
            "lr_factor": lambda value: is_finite(value) and 0 < value <= 1,
            "losses": lambda value: isinstance(value, list) and all(map(is_finite, value)),
            "back_to": lambda value: value is None or (type(value) is int and 0 <= value < MAX_STEP),
        }
        for name, value in fields.items():
            if name not in right or not right[name](value):
                raise UserError(f"course {name:.50} cannot be {value!r:.50}")
        return Course(**{**fields, "losses": deque(fields.get("losses", ()), maxlen=WINDOW)})


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


def is_finite(value: Any) -> bool:
    """Whether JSON's value is a number, and a finite one."""
    # A whole number may be larger than any float.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


class Guard:
    """Judges every step.

    Args:
        config: The recipe's ``[guard]`` table.
        course: Changed in place.
    """

    def __init__(self, config: GuardConfig, course: Course) -> None:
        self.config, self.course = config, course

    def complaint(self, loss: float, grad_norm: float | None) -> str:
        """What is wrong with a step; empty if nothing is.

        Args:
            loss: Of the global batch.
            grad_norm: Over all parameters; None where a gradient scaler expects overflows and skips them itself.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        losses, factor = self.course.losses, self.config.loss_spike
        if factor and len(losses) >= FEWEST and loss > factor * statistics.median(losses):
            usual = statistics.median(losses)
            return f"the loss is {loss:.4g}, over {factor:g} times {usual:.4g}, the median of the last {len(losses)}"
        return ""

    def accept(self, loss: float) -> None:
        """A good step."""
        self.course.skipped = 0
        self.course.losses.append(loss)

    def refuse(self, step: int, complaint: str, capsule: str) -> str:
        """A bad one: returns the sentence to say if it is to be skipped.

        Raises:
            BadStepError: The policy is to stop.
            RewindError: It is to skip, but there were too many in a row.
        """
        replay = f"; `sslkit replay {capsule}` computes it again" if capsule else ""
        sentence = f"step {step}: {complaint}"
        if self.config.policy == "stop":
            raise BadStepError(
                f"{sentence}; stopped before the weights moved{replay}. Usual cures: a lower [optim] lr, a longer "
                "[schedule] warmup_epochs, [train] precision = 'bf16' or 'no', [guard] policy = 'skip'"
            )
        self.course.skipped += 1
        if self.course.skipped > self.config.max_skips:
            raise RewindError(f"{sentence}; bad steps in a row: {self.course.skipped}{replay}")
        return f"{sentence}; skipped ({self.course.skipped} in a row){replay}"


class RunningStatistics:
    """BatchNorm's running statistics as they were before a step; a bad batch has touched them already."""

    def __init__(self, module: nn.Module, config: GuardConfig) -> None:
        # A run that stops has no use for them.
        self.tensors = list(_statistics(module)) if config.policy == "skip" else []
        self.before: list[Tensor] = []

    def remember(self) -> None:
        """Before the forward pass."""
        self.before = [tensor.clone() for tensor in self.tensors]

    def put_back(self) -> None:
        """After one that is refused."""
        for tensor, value in zip(self.tensors, self.before, strict=True):
            tensor.copy_(value)


def _statistics(module: nn.Module) -> Iterable[Tensor]:
    for child in module.modules():
        if isinstance(child, (nn.modules.batchnorm._NormBase, GlobalBatchNorm)):
            yield from child.buffers(recurse=False)
