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
Permutation = NDArray[np.int64]
Prepare = Callable[[Tensor], Tensor]


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
    updates_per_epoch: int = 1

    @property
    def fraction(self) -> float:
        """Share of training done, in [0, 1]."""
        return self.updates / self.total_updates

    @property
    def epoch(self) -> float:
        """Passes over the data made so far."""
        return self.updates / self.updates_per_epoch


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
        teacher_views: Which views the teacher looks at; under `shuffle_keys` these are shuffled for it.
        student_key_views: Views that are keys to the student itself (end-to-end): shuffled for it under
            `shuffle_keys`. View i's features are then the student's i-th.
    """

    Options: ClassVar[type[MethodOptions]]
    shuffle_keys: bool = False
    teacher_views: tuple[int, ...] = ()
    student_key_views: tuple[int, ...] = ()
    backbone: nn.Module
    bn_groups: int = 1

    @staticmethod
    @abstractmethod
    def paper_defaults(family: Family) -> dict[str, dict[str, Any]]:
        """The paper's recipe for a backbone of this family: recipe tables that a user's recipe is laid over."""

    def student(self, views: Views) -> Features:
        """Features of the views the student looks at, each (B, D), with gradient; all of them, unless overridden."""
        return [self.backbone(view) for view in views]

    def teacher(self, views: Views) -> Features:
        """Features of `teacher_views` by the teacher, each (B, D), without gradient; empty without a teacher."""
        return []

    @abstractmethod
    def objective(self, student_features: Features, teacher_features: Features, sample_ids: Tensor) -> Step:
        """Heads and loss on the whole batch's features.

        Args:
            student_features: What `student` returned for this process's whole batch.
            teacher_features: What `teacher` returned, in the same order of samples.
            sample_ids: (B,) int64, positions in the data.
        """

    def meet_data(self, num_samples: int) -> None:
        """Learn how many samples there are, once, before training: a memory bank has a row for each."""

    def before_update(self, progress: Progress) -> None:
        """Change gradients before an optimizer update; ``progress`` counts the updates before it."""

    def after_update(self, progress: Progress) -> dict[str, float]:
        """Move the teacher and push keys, after each optimizer update; ``progress`` counts that update.

        Returns:
            What to log of it, such as the momentum used.
        """
        return {}

    def forward(
        self,
        views: Views,
        sample_ids: Tensor,
        permutation: Permutation | None = None,
        prepare: Prepare | None = None,
    ) -> Step:
        """`objective` after `student` and `teacher`, in BN groups, keys shuffled.

        Args:
            views: Images as ``prepare`` takes them, each of B rows; without it normalised, (B, 3, H, W).
            sample_ids: (B,) int64, positions in the data.
            permutation: (N,) int64, the same on every process; needed if `shuffle_keys`.
            prepare: Makes a view of a few samples fit for the backbone: its normalisation.
        """
        groups = local_bn_groups(self.bn_groups)
        student_features = self.student_in_slices(views, groups, permutation, prepare)
        teacher_features = self.teacher_in_slices(views, groups, permutation, prepare)
        return self.objective(student_features, teacher_features, sample_ids)

    def student_in_slices(
        self,
        views: Views,
        slices: int,
        permutation: Permutation | None = None,
        prepare: Prepare | None = None,
        before_slice: Callable[[int], None] | None = None,
    ) -> Features:
        """`student` slice by slice; key views are shuffled before and their features put back after."""
        views = shuffle_views(views, self.student_key_views, permutation)
        features = encode_in_slices(self.student, views, slices, prepare, before_slice)
        if permutation is not None:
            for index in self.student_key_views:
                features[index] = exchange_rows(features[index], np.argsort(permutation))
        return features

    def teacher_in_slices(
        self,
        views: Views,
        slices: int,
        permutation: Permutation | None = None,
        prepare: Prepare | None = None,
        before_slice: Callable[[int], None] | None = None,
    ) -> Features:
        """`teacher` slice by slice; its views are shuffled before and its features put back after."""
        if not self.teacher_views:
            return []
        views = shuffle_views(views, self.teacher_views, permutation)
        features = encode_in_slices(self.teacher, views, slices, prepare, before_slice)
        if permutation is not None:
            features = [exchange_rows(each, np.argsort(permutation)) for each in features]
        return features


class PreparedViews(Sequence[Tensor]):
    """Views that are prepared when they are looked at: a method may look at one only."""

    def __init__(self, views: Views, prepare: Prepare) -> None:
        self.views, self.prepare = views, prepare

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: Any) -> Any:
        return self.prepare(self.views[index])


def local_bn_groups(bn_groups: int) -> int:
    """How many of the global batch's BN groups lie on this process; never less than one."""
    return max(bn_groups // world_size(), 1)


def shuffle_views(views: Views, which: tuple[int, ...], permutation: Permutation | None) -> Views:
    """Permute the global batch of some views, across processes."""
    if permutation is None:
        return views
    return [exchange_rows(view, permutation) if index in which else view for index, view in enumerate(views)]


def slice_views(views: Views, slices: int, prepare: Prepare | None = None) -> list[Views]:
    """Cut the batch into ``slices`` contiguous parts of equal size."""
    parts = zip(*(view.chunk(slices) for view in views), strict=True)
    return [PreparedViews(part, prepare) if prepare else part for part in parts]


def encode_in_slices(
    encode: Callable[[Views], Features],
    views: Views,
    slices: int,
    prepare: Prepare | None = None,
    before_slice: Callable[[int], None] | None = None,
) -> Features:
    """Encode contiguous slices of the batch one after the other, each with its own batch statistics."""
    parts = []
    for index, part in enumerate(slice_views(views, slices, prepare)):
        if before_slice is not None:
            before_slice(index)
        parts.append(encode(part))
    return [torch.cat(features) if slices > 1 else features[0] for features in zip(*parts, strict=True)]
