"""Schedules of learning rate, weight decay, momentum and temperature, as pure functions of the position in training.

One family: `linear` and `cosine` go from a start to an end. `warmup_then_cosine` and `warmup_then_steps` put a linear
warm-up before a decay. Any value can be scheduled: the learning rate and the weight decay by ``[schedule]``, a
teacher's momentum by ``[method]``, anything else inside `Method.objective`, which is given the `Progress`.
"""

import math
from collections.abc import Sequence
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


def linear(position: float, length: float, start: float, end: float) -> float:
    """A straight line from ``start`` at position 0 to ``end`` at ``length``, where it stays."""
    return start + (end - start) * position / length if position < length else end


def cosine(position: float, length: float, start: float, end: float) -> float:
    """Half a cosine from ``start`` at position 0 to ``end`` at ``length``, where it stays.

    BYOL and MoCo v3 raise the teacher's momentum to 1 so, DINO the weight decay from 0.04 to 0.4.
    """
    fraction = min(position / max(length, 1e-12), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * fraction))


def half_life_momentum(images: float, half_life: float) -> float:
    """Momentum of an update after ``images`` images that halves the teacher's own weight every ``half_life`` images."""
    return float(0.5 ** (images / half_life))


def momentum_text(momentum: float) -> str:
    """A momentum with three decimals, or as many as show how far from 1 it is: 0.906, 0.99975."""
    if not 0 < momentum < 1:
        return f"{momentum:g}"
    return f"{momentum:.{max(3, 1 - math.floor(math.log10(1 - momentum)))}f}"


def per_epoch(epoch: float) -> float:
    """Round a position in epochs down to the start of its epoch, for papers that change the rate once an epoch.

    There is slack for the rounding of ``updates / updates_per_epoch``.
    """
    return float(math.floor(epoch + 1e-9))


def warmup_then_cosine(
    epoch: float, epochs: float, warmup_epochs: float, peak: float, start: float = 0.0, final: float = 0.0
) -> float:
    """Linear from ``start`` to ``peak`` over ``warmup_epochs``, then half a cosine to ``final`` at ``epochs``.

    With ``warmup_epochs = 0`` this is MoCo v2's schedule; with a warm-up it is MoCo v3's (arXiv:2104.02057, appendix
    A), SimCLR's and BYOL's; with ``start`` and ``final`` it is SwAV's.
    """
    if epoch < warmup_epochs:
        return linear(epoch, warmup_epochs, start, peak)
    return cosine(epoch - warmup_epochs, epochs - warmup_epochs, peak, final)


def warmup_then_steps(
    epoch: float, milestones: Sequence[float], factor: float, warmup_epochs: float, peak: float, start: float = 0.0
) -> float:
    """Linear warm-up, then ``peak`` times ``factor`` for each milestone passed (MoCo v1: 0.1 at epochs 120, 160)."""
    if epoch < warmup_epochs:
        return linear(epoch, warmup_epochs, start, peak)
    return peak * factor ** sum(epoch >= milestone for milestone in milestones)
