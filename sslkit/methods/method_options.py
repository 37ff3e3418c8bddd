"""The ``[method]`` table: options that several methods share, and how they fit a run on few images."""

import math
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from sslkit.distributed.collectives import processes_started, world_size
from sslkit.parts.schedules import Progress, cosine, half_life_momentum, momentum_text

HALF_LIFE_SHARE = 0.05  # of the images of a run: docs/plan.md
SHORTEST_HALF_LIFE = 7  # updates: momentum 0.9; a faster teacher gives inconsistent keys (MoCo v1, table 3)
BN_GROUP, MOST_BN_GROUPS = 16, 8  # images: docs/plan.md; groups: the GPUs of MoCo v1
LONGEST_HALF_LIFE = 177_000.0  # images: momentum 0.999 at batch size 256 (MoCo v1)


class Fitted(NamedTuple):
    """A value of an option that fits a run, and the reason in half a sentence."""

    value: Any
    reason: str


class MethodOptions(BaseModel):
    """Base class of a method's ``[method]`` options: typed and frozen; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MomentumOptions(MethodOptions):
    """Base class of the options of a method with momentum teachers.

    Attributes:
        momentum: Weight of the teacher's own value in every update. 1 is a frozen teacher, 0 the student itself.
        momentum_schedule: ``"constant"``, or ``"cosine"``: from ``momentum`` to 1 at the end of training.
        momentum_half_life: Images after which the teacher's own value counts one half, whatever the batch size. It
            takes the place of ``momentum`` and its schedule.
    """

    momentum: float = Field(ge=0.0, le=1.0)
    momentum_schedule: Literal["constant", "cosine"] = "constant"
    momentum_half_life: float | None = Field(default=None, gt=0.0)

    def momentum_at(self, progress: Progress) -> float:
        """Momentum at a position in training."""
        if self.momentum_half_life is not None:
            return half_life_momentum(progress.batch_size, self.momentum_half_life)
        if self.momentum_schedule == "cosine":
            return cosine(progress.updates, progress.total_updates, self.momentum, 1.0)
        return self.momentum

    @classmethod
    def fitted_half_life(cls, start: Progress) -> dict[str, Fitted]:
        """A half-life of the teacher that fits the length of a run."""
        images = start.total_updates * start.batch_size
        half_life = max(min(HALF_LIFE_SHARE * images, LONGEST_HALF_LIFE), SHORTEST_HALF_LIFE * start.batch_size)
        momentum = half_life_momentum(start.batch_size, half_life)
        reason = f"the teacher's, in images: {half_life / images:.0%} of the run (momentum {momentum_text(momentum)})"
        return {"momentum_half_life": Fitted(float(round(half_life)), reason)}


def power_of_two(limit: float) -> int:
    """The largest power of two up to ``limit``; 1 if there is none."""
    return 1 << max(int(limit), 1).bit_length() - 1


def negatives_below(num_images: int, most: int) -> int:
    """A power of two of at most half the images, so that negatives are of other images than the query."""
    return min(power_of_two(max(num_images / 2, 2)), most)


def fitted_bn_groups(batch_size: int) -> Fitted:
    """BatchNorm groups of 16 images or more, but two at least; as many on each process, a divisor of its batch."""
    processes = max(world_size(), processes_started())
    own, each = power_of_two(max(min(batch_size / BN_GROUP, MOST_BN_GROUPS), 2) / processes), batch_size // processes
    groups = math.gcd(each, min(own, power_of_two(each / 2))) * processes
    if groups == 1:
        return Fitted(1, f"a batch of {batch_size} has no equal groups to shuffle keys between; a multiple of 4 has")
    reason = (
        f"of {batch_size // groups} images; keys are shuffled between them: batch statistics do not reveal the positive"
    )
    return Fitted(groups, reason)
