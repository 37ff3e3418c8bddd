"""Which steps must not reach the weights, because their loss or gradient is not finite or spikes.

Loss and gradient norm are equal on all processes, so that all decide alike without communication. A GPU decides for
itself, so that nobody waits for its numbers; the host comes to the same decision when it reads them.
"""

import math
import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sslkit.distributed.collectives import tensors_by_dtype, upload
from sslkit.engine.state import LOSS_WINDOW, RecoveryState
from sslkit.errors import RunError
from sslkit.parts.memory_bank import MemoryBank
from sslkit.parts.queue import KeyQueue
from sslkit.recipe.schema import GuardConfig

MIN_LOSSES = 20  # good losses that must be known before a loss can be a spike


class BadStepError(RunError):
    """A step's loss or gradient is bad, and the run stops. The weights are those of the last good step."""


class RewindError(BadStepError):
    """There were too many consecutive bad steps: the run must go back to a checkpoint."""


class Guard:
    """Decides for every step whether it may reach the weights, and counts bad steps in ``recovery``.

    Args:
        config: ``[guard]``.
        recovery: The bad steps so far; changed in place.
        module: Holds the buffers that a bad batch changes before it is found to be bad, such as running statistics.
        lag: Number of steps that are started before the numbers of one are read.
        scaled: Whether a gradient scaler skips steps as well.
    """

    def __init__(
        self, config: GuardConfig, recovery: RecoveryState, module: nn.Module, *, lag: int = 0, scaled: bool = False
    ) -> None:
        self.config, self.recovery = config, recovery
        # A run that stops at a bad step need not restore anything; one with a scaler goes on after an overflow.
        restores = config.policy == "skip" or scaled
        self.statistics = tensors_by_dtype(_small_buffers(module)) if restores else []
        self._before: list[list[list[Tensor]]] = [[] for _ in range(lag + 1)]  # of the latest steps
        self._verdicts: DeviceVerdicts | None = None

    @torch.no_grad()
    def snapshot(self, step: int) -> None:
        """Copy the small buffers; called before the forward pass of ``step``."""
        slot = step % len(self._before)
        if not self._before[slot]:
            self._before[slot] = [[tensor.clone() for tensor in alike] for alike in self.statistics]
            return
        for copies, alike in zip(self._before[slot], self.statistics, strict=True):
            torch._foreach_copy_(copies, alike)

    @torch.no_grad()
    def restore(self, step: int) -> None:
        """Undo what a bad step, and those started after it, did to the small buffers; they may be made again."""
        for copies, alike in zip(self._before[step % len(self._before)], self.statistics, strict=True):
            torch._foreach_copy_(alike, copies)
        self._verdicts = None

    def allow(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether a step may reach the weights, decided on the device: a () float tensor of 1 or 0.

        It is what `problem` says on the host. After a bad step nothing is allowed until `restore`.
        """
        if self._verdicts is None:
            self._verdicts = DeviceVerdicts(self.config.loss_spike, self.recovery.losses, loss.device)
        return self._verdicts.allow(loss, grad_norm)

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


class DeviceVerdicts:
    """The guard's decisions on a device. None is allowed after one that was not.

    Args:
        factor: A loss above this many times the median of ``losses`` is a spike; 0: no check.
        losses: The latest losses of good steps, at most `LOSS_WINDOW`.
        device: Where losses are.
    """

    def __init__(self, factor: float, losses: Sequence[float], device: torch.device) -> None:
        self.factor = factor
        self.allowed = torch.ones((), device=device)
        window = [*losses, *[math.inf] * (LOSS_WINDOW - len(losses))]
        self.losses = upload(torch.tensor(window, dtype=torch.float64), device) if factor else None
        self.count = torch.full((), len(losses), device=device)

    @torch.no_grad()
    def allow(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether a step is good and all before it were: a () float tensor of 1 or 0."""
        good = torch.isfinite(loss) & torch.isfinite(grad_norm)
        if self.losses is not None:
            good = good & ~self._is_spike(loss.double(), self.losses)
        self.allowed = torch.where(good, self.allowed, torch.zeros_like(self.allowed))
        if self.losses is not None:
            self._append(loss.double(), self.losses)
        return self.allowed

    def _is_spike(self, loss: Tensor, losses: Tensor) -> Tensor:
        """Whether a loss is over ``factor`` times the median; unknown ones are infinite and come last."""
        middle = torch.stack([(self.count - 1) // 2, self.count // 2]).clamp(0, LOSS_WINDOW - 1)
        median = losses.sort().values[middle].sum() / 2
        return (self.count >= MIN_LOSSES) & (loss > self.factor * median)

    def _append(self, loss: Tensor, losses: Tensor) -> None:
        """Put a good loss in place of the oldest one: the window is kept in order, the newest last."""
        shifted = torch.where(
            self.count < LOSS_WINDOW,
            losses.scatter(0, self.count.clamp(max=LOSS_WINDOW - 1)[None], loss[None]),
            torch.cat([losses[1:], loss[None]]),
        )
        losses.copy_(torch.where(self.allowed > 0, shifted, losses))
        self.count = torch.minimum(self.count + self.allowed.long(), torch.full_like(self.count, LOSS_WINDOW))


def _small_buffers(module: nn.Module) -> Iterator[Tensor]:
    """All buffers but the stored keys, which change under a gate (`sslkit.parts.updates.update_gate`)."""
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            if not (isinstance(child, KeyQueue | MemoryBank) and name in ("keys", "rows")):
                yield buffer
