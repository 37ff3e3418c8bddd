"""What every method is: a student that learns, a teacher it may have, an objective, and a rule between updates.

The teacher's clock, said once for all methods: the official MoCo code moves the teacher *inside* forward, before it
computes the keys, with the student that the previous update left. Here `Method.after_update` moves it right *after*
that update, with the momentum of the step to come. Both give every step the same teacher: the official move at step 0
mixes two equal networks, and ours after the last update is the one the official code would make next.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from sslkit.distributed.collectives import exchange_rows, world_size
from sslkit.errors import UserError
from sslkit.parts.backbone import Family
from sslkit.parts.batchnorm import GroupStatistics, synchronise_in_groups

Views = Sequence[Tensor]
Features = list[Tensor]
Permutation = NDArray[np.int64]
Prepare = Callable[[Tensor], Tensor]
ViewCount = int | tuple[int, int | None]
VIEW_ROLES = ("global", "local")


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


@dataclass(frozen=True)
class PaperRun:
    """Numbers that a paper gives for runs of one length or batch size only.

    Attributes:
        train: Keys of ``[train]`` by which the run is known, such as ``{"epochs": 300}``.
        tables: Its numbers, by recipe table.
    """

    train: Mapping[str, int]
    tables: Mapping[str, Mapping[str, Any]]


class Method(nn.Module, ABC):
    """A self-supervised method. It owns what it trains and knows no device, precision, loader, optimizer or loop.

    Attributes:
        Options: The method's ``[method]`` table.
        views: How many views of each role the method takes: an exact number, or the fewest and the most (None: any
            number). ``global`` views have ``[views] size``, ``local`` ones are the small crops. A role that is left out
            is not taken. The views come in this order: global, then local.
        backbone: The encoder that is learned for its own sake: (B, 3, H, W) -> (B, D).
        bn_groups: Into how many groups of its own batch statistics the *global* batch falls. 1: one for all
            (synchronised). The papers' 8 GPUs without synchronisation are 8 groups, on any number of processes.
        groups_across_processes: Whether a group may span processes. Otherwise each process is a group where there are
            more processes than groups.
        shuffle_keys: Whether keys must be computed among other companions than their queries (shuffling BN).
        teacher_views: Which views the teacher looks at; under `shuffle_keys` these are shuffled for it.
        student_key_views: Views that are keys to the student itself (end-to-end): shuffled for it under
            `shuffle_keys`. View i's features are then the student's i-th.
    """

    Options: ClassVar[type[MethodOptions]]
    views: ClassVar[Mapping[str, ViewCount]] = {"global": 2}
    shuffle_keys: bool = False
    teacher_views: tuple[int, ...] = ()
    student_key_views: tuple[int, ...] = ()
    backbone: nn.Module
    bn_groups: int = 1
    groups_across_processes: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def paper_defaults(family: Family) -> dict[str, dict[str, Any]]:
        """The paper's recipe for a backbone of this family: recipe tables that a user's recipe is laid over."""

    @staticmethod
    def paper_runs(family: Family) -> Sequence[PaperRun]:
        """Runs of the paper whose numbers depend on their length or batch size, the one of `paper_defaults` too.

        A recipe of such a length or batch size gets the run's numbers. Any other gets those of `paper_defaults`, and
        the user is told.
        """
        return ()

    @classmethod
    def remark_on_batch(cls, options: Any, batch_size: int) -> str:
        """A sentence for the user about what becomes of the options at this global batch; empty if there is none."""
        return ""

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
        statistics = self.group_statistics(slices, of_teacher=False)
        features = encode_in_slices(self.student, views, slices, prepare, before_slice, statistics)
        if permutation is not None:
            for index in self.student_key_views:
                features[index] = exchange_rows(features[index], np.argsort(permutation))
        return features

    def group_statistics(self, slices: int, *, of_teacher: bool) -> GroupStatistics | None:
        """The running statistics of the encoder that is about to see the batch in groups; None if it is one group."""
        if slices == 1 and (self.bn_groups == 1 or world_size() == 1):
            return None
        encoder = getattr(self, "teacher_backbone", None) if of_teacher else self.backbone
        return GroupStatistics([encoder] if isinstance(encoder, nn.Module) else [])

    def batch_norm_groups(self) -> dict[str, int]:
        """By the name of a child: into how many BN groups the global batch falls for it; for all others it is one."""
        return {"backbone": self.bn_groups, "teacher_backbone": self.bn_groups}

    def synchronise_batch_norm(self, device: torch.device) -> None:
        """Compute batch statistics over the processes that share a group; called once, by all processes."""
        across = self.groups_across_processes
        synchronise_in_groups(self, device, self.batch_norm_groups(), across_processes=across)

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
        statistics = self.group_statistics(slices, of_teacher=True)
        features = encode_in_slices(self.teacher, views, slices, prepare, before_slice, statistics)
        if permutation is not None:
            features = [exchange_rows(each, np.argsort(permutation)) for each in features]
        return features


def view_mistake(name: str, method: type[Method], role: str, made: int) -> str:
    """What is wrong with the number of views of one role, in a few words; empty if the method takes so many.

    Args:
        name: Of the method.
        method: Its class.
        role: One of `VIEW_ROLES`.
        made: How many views of this role are made of each image.

    Raises:
        UserError: The method declares a role that there is not.
    """
    if unknown := sorted(set(method.views) - set(VIEW_ROLES)):
        raise UserError(f"[method] name: {name} declares views of role {unknown[0]!r}; the roles are {VIEW_ROLES}")
    count = method.views.get(role, 0)
    fewest, most = count if isinstance(count, tuple) else (count, count)
    if made >= fewest and (most is None or made <= most):
        return ""
    if most == 0:
        way_out = "set it to 0"
        if role == "local" and method.views is Method.views and not method.__module__.startswith("sslkit."):
            way_out += f'. If it takes them, declare views = {{"global": 2, "local": (0, None)}} in {method.__name__}'
        return f"{name} takes no {role} views; {way_out}"
    if most is None:
        return f"{name} takes {fewest} or more {role} views; set it to {fewest}"
    wanted = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return f"{name} takes {wanted} {role} views; set it to {min(max(made, fewest), most)}"


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
    statistics: GroupStatistics | None = None,
) -> Features:
    """Encode contiguous slices of the batch one after the other, each with its own batch statistics.

    ``statistics`` make one update of the running statistics of it.
    """
    parts = []
    for index, part in enumerate(slice_views(views, slices, prepare)):
        if before_slice is not None:
            before_slice(index)
        if statistics is not None:
            statistics.start_group()
        parts.append(encode(part))
        if statistics is not None:
            statistics.end_group()
    if statistics is not None:
        statistics.finish()
    return [torch.cat(features) if slices > 1 else features[0] for features in zip(*parts, strict=True)]
