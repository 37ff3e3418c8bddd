"""Which steps must not reach the weights, because their loss or gradient is not finite or spikes.

Loss and gradient norm are equal on all processes, so that all decide alike without communication.
"""

import math
import statistics
from collections.abc import Iterator

from torch import Tensor, nn

from sslkit.engine.state import RecoveryState
from sslkit.errors import RunError
from sslkit.parts.batchnorm import GlobalBatchNorm
from sslkit.recipe.schema import GuardConfig

MIN_LOSSES = 20  # good losses that must be known before a loss can be a spike


class BadStepError(RunError):
    """A step's loss or gradient is bad, and the run stops. The weights are those of the last good step."""


class RewindError(BadStepError):
    """There were too many consecutive bad steps: the run must go back to a checkpoint."""


class Guard:
    """Decides for every step whether it may reach the weights, and counts bad steps in ``recovery``.

    ``module`` holds the BatchNorm statistics that a bad batch changes before it is found to be bad.
    """

    def __init__(self, config: GuardConfig, recovery: RecoveryState, module: nn.Module) -> None:
        self.config, self.recovery = config, recovery
        # A run that stops at a bad step need not restore anything.
        self.statistics = list(_running_statistics(module)) if config.policy == "skip" else []
        self._before: list[Tensor] = []

    def snapshot(self) -> None:
        """Copy the running statistics; called before the forward pass."""
        self._before = [tensor.clone() for tensor in self.statistics]

    def restore(self) -> None:
        """Undo what a bad step did to the running statistics."""
        for tensor, value in zip(self.statistics, self._before, strict=True):
            tensor.copy_(value)

    def problem(self, loss: float, grad_norm: float | None) -> str:
        """Say what is wrong with a step; empty if nothing is.

        ``grad_norm`` is None under a gradient scaler, which skips overflows itself.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        losses, factor = self.recovery.losses, self.config.loss_spike
        if factor and len(losses) >= MIN_LOSSES and loss > factor * (median := statistics.median(losses)):
            return f"the loss is {loss:.4g}, over {factor:g} times {median:.4g}, the median of the last {len(losses)}"
        return ""

    def accept(self, loss: float) -> None:
        """Count a good step."""
        self.recovery.skipped = 0
        self.recovery.losses.append(loss)

    def refuse(self, step: int, problem: str, crash_dump: str) -> str:
        """Count a bad step (from 0); returns the message to log if it is skipped. ``crash_dump`` may be empty.

        Raises:
            BadStepError: The policy is to stop.
            RewindError: The policy is to skip, but there were too many consecutive bad steps.
        """
        replay = f"; `sslkit replay {crash_dump}` computes it again" if crash_dump else ""
        message = f"step {step}: {problem}"
        if self.config.policy == "stop":
            raise BadStepError(
                f"{message}; stopped before the weights were updated{replay}. Things to try: a lower [optim] lr, a "
                "longer [schedule] warmup_epochs, [train] precision = 'bf16' or 'no', [guard] policy = 'skip'"
            )
        self.recovery.skipped += 1
        if self.recovery.skipped > self.config.max_skips:
            raise RewindError(f"{message}; consecutive bad steps: {self.recovery.skipped}{replay}")
        return f"{message}; skipped ({self.recovery.skipped} in a row){replay}"


def _running_statistics(module: nn.Module) -> Iterator[Tensor]:
    for child in module.modules():
        if isinstance(child, (nn.modules.batchnorm._NormBase, GlobalBatchNorm)):
            yield from child.buffers(recurse=False)
