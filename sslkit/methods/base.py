"""What every method is: a student that learns, a teacher it may have, an objective, and a rule between updates.

The teacher's clock, said once for all methods: the official MoCo code moves the teacher *inside* forward, before it
computes the keys, with the student that the previous update left. Here `Method.after_update` moves it right *after*
that update, with the momentum of the step to come. Both give every step the same teacher: the official move at step 0
mixes two equal networks, and ours after the last update is the one the official code would make next.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from sslkit.parts.backbone import Family
from sslkit.parts.collectives import exchange_rows, world_size

Views = Sequence[Tensor]
Features = list[Tensor]


@dataclass
class Step:
    """What a forward pass returns.

    Attributes:
        loss: () tensor; its mean over processes is the loss of the global batch.
        metrics: Scalars to log, each averaged over processes.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Position in training: ``updates`` made so far of ``total_updates``."""

    updates: int
    total_updates: int

    @property
    def fraction(self) -> float:
        """Share of training done, in [0, 1]."""
        return self.updates / self.total_updates


class MethodOptions(BaseModel):
    """Base of every method's ``[method]`` options: typed, frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Method(nn.Module, ABC):
    """A self-supervised method. It owns what it trains and knows no device, precision, loader, optimizer or loop.

    Attributes:
        Options: The method's ``[method]`` table.
        backbone: The encoder that is learned for its own sake: (B, 3, H, W) -> (B, D).
        bn_groups: Into how many groups of its own batch statistics the *global* batch falls. 1: one for all
            (synchronised). The papers' 8 GPUs without synchronisation are 8 groups, on any number of processes.
        shuffle_keys: Whether keys must be computed among other companions than their queries (shuffling BN).
        teacher_views: Which views the teacher looks at; only these are moved by the shuffle.
    """

    Options: ClassVar[type[MethodOptions]]
    shuffle_keys: ClassVar[bool] = False
    teacher_views: ClassVar[tuple[int, ...]] = ()
    backbone: nn.Module
    bn_groups: int = 1

    @staticmethod
    @abstractmethod
    def paper_defaults(family: Family) -> dict[str, dict[str, Any]]:
        """The paper's recipe for a backbone of this family: recipe tables that a user's recipe is laid over."""

    @abstractmethod
    def student(self, views: Views) -> Features:
        """Features of the views the student looks at, each (B, D), with gradient."""

    @abstractmethod
    def teacher(self, views: Views) -> Features:
        """Features of `teacher_views` by the teacher, each (B, D), without gradient; empty without a teacher."""

    @abstractmethod
    def objective(self, student_features: Features, teacher_features: Features, sample_ids: Tensor) -> Step:
        """Heads and loss on the whole batch's features.

        Args:
            student_features: What `student` returned for this process's whole batch.
            teacher_features: What `teacher` returned, in the same order of samples.
            sample_ids: (B,) int64, positions in the data.
        """

    @abstractmethod
    def after_update(self, progress: Progress) -> dict[str, float]:
        """Move the teacher and push keys, after each optimizer update; ``progress`` counts that update.

        Returns:
            What to log of it, such as the momentum used.
        """

    def forward(self, views: Views, sample_ids: Tensor, permutation: NDArray[np.int64] | None = None) -> Step:
        """`objective` after `student` and `teacher`, in BN groups, the teacher's batch shuffled.

        Args:
            views: Normalised images, each (B, 3, H, W).
            sample_ids: (B,) int64, positions in the data.
            permutation: (N,) int64, the same on every process; needed if `shuffle_keys`.
        """
        groups = local_bn_groups(self.bn_groups)
        student_features = _in_groups(self.student, views, groups)
        if permutation is not None:
            views = [
                exchange_rows(view, permutation) if index in self.teacher_views else view
                for index, view in enumerate(views)
            ]
        teacher_features = _in_groups(self.teacher, views, groups)
        if permutation is not None:
            restore = np.argsort(permutation)
            teacher_features = [exchange_rows(features, restore) for features in teacher_features]
        return self.objective(student_features, teacher_features, sample_ids)


def local_bn_groups(bn_groups: int) -> int:
    """How many of the global batch's BN groups lie on this process; never less than one."""
    return max(bn_groups // world_size(), 1)


def _in_groups(encode: Callable[[Views], Features], views: Views, groups: int) -> Features:
    """Encode contiguous groups of the batch one after the other, each with its own batch statistics."""
    if groups == 1:
        return encode(views)
    parts = [encode(group) for group in zip(*(view.chunk(groups) for view in views), strict=True)]
    return [torch.cat(features) for features in zip(*parts, strict=True)]
