"""A batch as the data loader yields it, and what is left to do to its views."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class BadSample:
    """An image that could not be read."""

    index: int  # position in the source
    name: str  # printable
    reason: str


@dataclass(frozen=True)
class StepGroup:
    """A step and the samples that it changes."""

    step: str
    rows: slice  # of the batch in the stage's order
    numbers: slice  # of `DevicePlan.packed`, float32


@dataclass(frozen=True)
class Stage:
    """Steps on different samples, of which none is in two groups."""

    order: slice | None  # of `DevicePlan.packed`, int32: the row that each row is taken from; None leaves them
    groups: tuple[StepGroup, ...]


@dataclass(frozen=True)
class ViewPlan:
    """The stages of one view, the order that restores the batch's, and the constants of the formulas."""

    stages: tuple[Stage, ...]
    restore: slice | None
    constants: slice  # 3 weights of the luma, then the sectors of the hue


@dataclass(frozen=True)
class DevicePlan:
    """The plan of each view of a batch; ``packed`` (N,) int32 has their orders, and their numbers as bits of floats."""

    packed: Tensor
    views: tuple[ViewPlan, ...]


@dataclass(frozen=True)
class Batch:
    """One process's share of a global batch.

    ``plan`` says what the accelerator still has to do to the views; None if they are finished.
    """

    views: list[Tensor]  # one (B, size, size, 3) uint8 tensor per view
    sample_ids: Tensor  # (B,) int64, positions in the source of the images (or replacements) that the views show
    bad: tuple[BadSample, ...] = ()
    plan: DevicePlan | None = None

    def pin_memory(self) -> "Batch":
        """Copy to pinned memory, so that the copy to a GPU is asynchronous; called by the DataLoader."""
        return self._changed(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """Copy to ``device``, without waiting if this batch is in pinned memory."""
        return self._changed(partial(Tensor.to, device=device, non_blocking=True))

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        return [*self.views, self.sample_ids, *([self.plan.packed] if self.plan else [])]

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        plan = self.plan and replace(self.plan, packed=change(self.plan.packed))
        return replace(self, views=[*map(change, self.views)], sample_ids=change(self.sample_ids), plan=plan)
