"""Learning rate and momentum as pure functions of the position in training.

A position is counted in epochs and may be fractional: ``epoch = updates / updates_per_epoch``. A schedule that the
paper sets once per epoch is called with the whole number; see `per_epoch`.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Position in training.

    Attributes:
        updates: Optimizer updates made so far.
        total_updates: Updates in the whole training.
        updates_per_epoch: Updates in one pass over the data.
        batch_size: Images of the global batch, that is, of one update.
    """

    updates: int
    total_updates: int
    updates_per_epoch: int = 1
    batch_size: int = 1

    @property
    def fraction(self) -> float:
        """Share of training done, in [0, 1]."""
        return self.updates / self.total_updates

    @property
    def epoch(self) -> float:
        """Passes over the data made so far."""
        return self.updates / self.updates_per_epoch


def per_epoch(epoch: float) -> float:
    """Round a position down to the start of its epoch, with slack for the rounding of ``updates / per_epoch``."""
    return float(math.floor(epoch + 1e-9))


def warmup_then_cosine(
    epoch: float, epochs: float, warmup_epochs: float, peak: float, start: float = 0.0, final: float = 0.0
) -> float:
    """Linear from ``start`` to ``peak`` over ``warmup_epochs``, then half a cosine to ``final`` at ``epochs``.

    With ``warmup_epochs = 0`` this is MoCo v2's cosine; with warm-up it is MoCo v3's (arXiv:2104.02057, app. A),
    SimCLR's and BYOL's; with ``start`` and ``final`` SwAV's.
    """
    if epoch < warmup_epochs:
        return start + (peak - start) * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def warmup_then_steps(
    epoch: float, milestones: list[float], factor: float, warmup_epochs: float, peak: float, start: float = 0.0
) -> float:
    """Linear warm-up, then ``peak`` times ``factor`` for each milestone passed (MoCo v1: 0.1 at epochs 120, 160)."""
    if epoch < warmup_epochs:
        return start + (peak - start) * epoch / warmup_epochs
    return peak * factor ** sum(epoch >= milestone for milestone in milestones)


def cosine_momentum(progress: float, start: float) -> float:
    """Teacher momentum from ``start`` at progress 0 to 1 at progress 1 (BYOL, MoCo v3: half a cosine)."""
    return 1.0 - 0.5 * (1.0 + math.cos(math.pi * progress)) * (1.0 - start)
