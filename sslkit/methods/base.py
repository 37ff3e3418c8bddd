"""The contract of a method: what it declares about itself, and what it computes.

A method owns what it trains: the student's backbone and heads, its momentum teachers, its queue or memory bank. It
knows no device, precision, data loader, optimizer or training loop. Everything the rest of sslkit needs to know of a
method is declared here; nothing outside ``methods/`` asks which method it has.

When the teacher is updated: the official MoCo code does it inside ``forward``, before it computes the keys, with the
student that the previous step left. `Method.after_update` does it right after that step, with the momentum of the next
one. Both give every step the same teacher. The official update at step 0 averages two equal networks, and the one after
the last step is the one the official code would make next.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sslkit.distributed.collectives import exchange_rows
from sslkit.methods.method_options import Fitted, MethodOptions
from sslkit.parts.adaptation.anchor import Anchor
from sslkit.parts.backbone import Family
from sslkit.parts.batch_slices import encode_each, encode_in_slices, local_bn_groups, shuffle_views
from sslkit.parts.batchnorm import GroupStatistics, batch_norms, can_divide, synchronise_in_groups
from sslkit.parts.chance_loss import ChanceLoss
from sslkit.parts.memory_bank import MemoryBank
from sslkit.parts.momentum_teacher import MomentumTeacher
from sslkit.parts.queue import KeyQueue
from sslkit.parts.schedules import Progress

Views = Sequence[Tensor]
Features = list[Tensor]
Permutation = NDArray[np.int64]
Prepare = Callable[[Tensor], Tensor]
ViewCount = int | tuple[int, int | None]
Negatives = Literal["none", "batch", "queue", "bank"]
VIEW_ROLES = ("global", "local")


@dataclass
class Step:
    """What a forward pass returns.

    Attributes:
        loss: () tensor. The mean over processes is the loss of the global batch.
        metrics: Scalars to log. Each is averaged over processes.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchInfo:
    """What is known of each sample of this process's batch, beside its views.

    Attributes:
        sample_ids: (B,) int64, the samples' positions in the data.
        extras: Other tensors of B rows each that were drawn with the views, such as masks, by name.
    """

    sample_ids: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PaperRun:
    """Numbers that a paper gives for runs of one length or batch size only.

    Attributes:
        train: Keys of ``[train]`` that identify the run, such as ``{"epochs": 300}``.
        tables: The run's numbers, by recipe table.
    """

    train: Mapping[str, int]
    tables: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Multipliers:
    """Factors on the recipe's learning rate and weight decay for some of a method's parameters."""

    lr: float = 1.0
    weight_decay: float = 1.0


class Method(nn.Module, ABC):
    """A self-supervised method.

    A subclass assigns its modules in ``__init__(backbone, feature_dim, options)``, implements `objective`, and declares
    whatever differs from the defaults below.

    Attributes:
        Options: The method's ``[method]`` table.
        views: How many views of each role the method takes: an exact number, or the fewest and the most (None: any
            number). ``global`` views have ``[views] size``, ``local`` ones are the small crops. A role that is left out
            is not taken. Views come in this order: global, then local.
        backbone: The student's encoder, (B, 3, H, W) -> (B, D).
        encoder_name: Path of the module that is monitored, evaluated, exported and published: the student's backbone,
            or a teacher's, such as ``"teacher_backbone.module"``.
        heads: Names of the modules that the student's features pass before they are compared, in order.
        negatives: Where the negatives come from: the ``batch``, a ``queue``, a memory ``bank``, or ``none``.
        stops_gradient: Whether the objective stops a gradient on the student's side, as a stop-gradient beside a
            predictor does.
        shardable: Whether the method works with sharded parameters (``[train] shard``).
        smallest_batch: The smallest global batch that the paper trains with well; 0 if it does not say.
        bn_groups: Number of groups of the global batch that have batch statistics of their own. 1: the whole batch
            shares them (synchronised). The papers' 8 GPUs without synchronisation are 8 groups, on any number of
            processes.
        groups_across_processes: Whether a group may span processes. If not, each process is a group where there are
            more processes than groups.
        keeps_statistics: Whether the student's backbone normalises by its running statistics while training.
        shuffle_keys: Whether keys are computed in another batch order than queries (shuffling BN).
        teacher_views: Indices of the views that the teacher encodes. Under `shuffle_keys` they are shuffled for it.
        student_key_views: Indices of the views that are keys to the student itself (end-to-end). Under `shuffle_keys`
            they are shuffled too; then view i's features must be the student's i-th.
    """

    Options: ClassVar[type[MethodOptions]]
    views: ClassVar[Mapping[str, ViewCount]] = {"global": 2}
    encoder_name: ClassVar[str] = "backbone"
    heads: ClassVar[tuple[str, ...]] = ()
    negatives: ClassVar[Negatives] = "none"
    stops_gradient: ClassVar[bool] = False
    shardable: ClassVar[bool] = False
    smallest_batch: ClassVar[int] = 0
    groups_across_processes: ClassVar[bool] = False
    backbone: nn.Module
    bn_groups: int = 1
    keeps_statistics: bool = False
    shuffle_keys: bool = False
    teacher_views: tuple[int, ...] = ()
    student_key_views: tuple[int, ...] = ()

    @staticmethod
    @abstractmethod
    def paper_defaults(family: Family) -> dict[str, dict[str, Any]]:
        """The paper's recipe for a backbone of this family: recipe tables that a user's recipe overrides."""

    @staticmethod
    def paper_runs(family: Family) -> Sequence[PaperRun]:
        """Runs of the paper whose numbers depend on their length or batch size, including that of `paper_defaults`.

        A recipe of such a length or batch size gets the numbers of that run. Any other gets those of `paper_defaults`,
        and the user is told.
        """
        return ()

    @classmethod
    def fitted_options(cls, num_images: int, start: Progress, stated: Mapping[str, Any]) -> dict[str, Fitted]:
        """Options for a run on few images, where the paper's values are for ImageNet.

        Args:
            num_images: Images in the data that differ.
            start: The start of the run, with its number of updates and its batch size.
            stated: The options that the user stated, which are kept: the others are to fit them.
        """
        return {}

    @classmethod
    def remark_on_batch(cls, options: Any, batch_size: int) -> str:
        """A sentence for the user about how the options change at this global batch size; empty if they do not."""
        return ""

    @property
    def encoder(self) -> nn.Module:
        """The encoder that is monitored, evaluated, exported and published, (B, 3, H, W) -> (B, D)."""
        return self.get_submodule(self.encoder_name)

    def teachers(self) -> Mapping[str, MomentumTeacher]:
        """The momentum teachers, by the name of the student's module that each one follows."""
        return {}

    def dictionaries(self) -> Mapping[str, KeyQueue | MemoryBank]:
        """Queues and memory banks, by name."""
        return {}

    def param_groups(self) -> Mapping[str, Multipliers]:
        """Multipliers for the parameters of some modules, by module name, where the paper has them."""
        return {}

    def chance_loss(self, batch_size: int) -> ChanceLoss | None:
        """The loss on embeddings that are independent of each other, for a global batch; None if it is not known."""
        return None

    def updates_to_fill_queue(self, batch_size: int) -> int:
        """Updates until the queue of negatives holds teacher's keys only; 0 without such a queue."""
        return 0

    def advise(self, start: Progress) -> Sequence[str]:
        """Sentences for the user on options that do not fit a run, each with a key to set; shown by ``sslkit doctor``.

        Args:
            start: The start of the run, with its number of updates and its batch size.
        """
        return ()

    def keep_statistics(self) -> None:
        """Normalise by the running statistics as they are now, in the student's backbone and its teacher's."""
        self.keeps_statistics = True
        if (teacher := self.teachers().get("backbone")) is not None:
            teacher.batch_statistics = False
        self.train(self.training)

    def keep_near(self, anchor: Anchor) -> None:
        """Add a term to the loss that keeps the student's features near the anchor's."""
        self.add_module("anchor_backbone", anchor)

    def train(self, mode: bool = True) -> "Method":
        """Set the mode of all modules; see `keep_statistics`."""
        super().train(mode)
        if self.keeps_statistics:
            for norm in batch_norms(self.backbone):
                norm.training = False
        return self

    def set_num_samples(self, num_samples: int) -> None:
        """Receive the number of samples in the data, once, before training: a memory bank has one row for each."""

    def student(self, views: Views) -> Features:
        """Features of the views that the student encodes, each (B, D), with gradient. By default of all views."""
        return encode_each(views, self.backbone)

    def teacher(self, views: Views) -> Features:
        """Features of `teacher_views`, each (B, D), without gradient. By default from the backbone's teacher."""
        return encode_each((views[view] for view in self.teacher_views), self.teachers()["backbone"])

    @abstractmethod
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        """Apply heads and loss to the features of the whole batch.

        Args:
            student_features: What `student` returned for this process's whole batch.
            teacher_features: What `teacher` returned, with the samples in the same order.
            batch: Sample ids, and whatever else was drawn for each sample.
            progress: Position in training; counts the updates before this step.
        """

    def before_update(self, progress: Progress) -> None:
        """Change gradients before an optimizer update. ``progress`` counts the updates before it."""

    def after_update(self, progress: Progress) -> dict[str, float]:
        """Move teachers and push keys after each optimizer update. ``progress`` includes that update.

        Returns:
            What to log, such as the momentum used.
        """
        return {}

    def update_teachers(self, progress: Progress) -> dict[str, float]:
        """Move every teacher towards the student's module that it follows.

        Returns:
            The momentum, to be logged.
        """
        logged = {}
        for name, teacher in self.teachers().items():
            logged["momentum"] = teacher.momentum_at(progress)
            teacher.update(self.get_submodule(name), logged["momentum"])
        return logged

    def forward(
        self,
        views: Views,
        batch: BatchInfo,
        progress: Progress,
        permutation: Permutation | None = None,
        prepare: Prepare | None = None,
    ) -> Step:
        """Compute `objective` of `student` and `teacher`, with keys shuffled. CPUs encode one BN group at a time.

        Args:
            views: Images as ``prepare`` takes them, B rows each; without ``prepare`` normalised, (B, 3, H, W).
            batch: See `objective`.
            progress: See `objective`.
            permutation: (N,) int64, an order of the global batch, the same on every process; needed if `shuffle_keys`.
            prepare: Normalises a view.
        """
        slices = self.slices_of(len(batch.sample_ids))
        student_features = self.student_in_slices(views, slices, permutation, prepare)
        teacher_features = self.teacher_in_slices(views, slices, permutation, prepare)
        anchored = self.anchor_in_slices(views, slices, permutation, prepare)
        return self.anchored(
            self.objective(student_features, teacher_features, batch, progress), student_features, anchored
        )

    def slices_of(self, rows: int, micro_batch: int = 0) -> int:
        """Number of passes over ``rows`` rows: slices of ``micro_batch`` (0: all) that are whole BN groups.

        On CPUs a slice has one group.
        """
        groups = local_bn_groups(self.bn_groups)
        slices = rows // micro_batch if micro_batch else 1
        in_one_pass = groups % slices == 0 and all(map(can_divide, self.backbones()))
        return slices if in_one_pass else max(slices, groups)

    def student_in_slices(
        self,
        views: Views,
        slices: int,
        permutation: Permutation | None = None,
        prepare: Prepare | None = None,
        before_slice: Callable[[int], None] | None = None,
    ) -> Features:
        """Call `student` slice by slice. Key views are shuffled before, and their features put back in order after."""
        views = shuffle_views(views, self.student_key_views, permutation)
        statistics = self.group_statistics(slices, [self.backbone])
        features = encode_in_slices(self.student, views, slices, prepare, before_slice, statistics)
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
        """Call `teacher` slice by slice. Its views are shuffled before, and its features put back in order after."""
        if not self.teacher_views:
            return []
        views = shuffle_views(views, self.teacher_views, permutation)
        statistics = self.group_statistics(slices, self.backbones()[1:])
        features = encode_in_slices(self.teacher, views, slices, prepare, before_slice, statistics)
        if permutation is not None:
            features = [exchange_rows(each, np.argsort(permutation)) for each in features]
        return features

    def anchor_in_slices(
        self, views: Views, slices: int, permutation: Permutation | None = None, prepare: Prepare | None = None
    ) -> Features:
        """What `student_in_slices` returns with the anchor as the backbone; empty without an anchor."""
        anchor = self._modules.get("anchor_backbone")
        if anchor is None:
            return []
        student, self.backbone = self.backbone, anchor
        try:
            with torch.no_grad():
                return self.student_in_slices(views, slices, permutation, prepare)
        finally:
            self.backbone = student

    def anchored(self, step: Step, student_features: Features, anchored: Features) -> Step:
        """Add the anchor's term to a step's loss; without an anchor, the step as it is."""
        anchor = self._modules.get("anchor_backbone")
        if not isinstance(anchor, Anchor):
            return step
        distance = anchor.distance(student_features, anchored)
        return Step(step.loss + anchor.weight * distance, {**step.metrics, "anchor": distance.detach()})

    def backbones(self) -> list[nn.Module]:
        """The large modules: the student's backbone and, if a teacher follows it, the teacher's."""
        teacher = self.teachers().get("backbone")
        return [self.backbone] if teacher is None else [self.backbone, teacher.module]

    def group_statistics(self, slices: int, encoders: list[nn.Module]) -> GroupStatistics:
        """The running statistics of encoders that see the batch in slices, each of one BN group or several."""
        groups = max(local_bn_groups(self.bn_groups) // slices, 1)
        return GroupStatistics(encoders, slices, groups=groups, average=self.bn_groups > 1)

    def batch_norm_groups(self) -> dict[str, int]:
        """Number of BN groups of the global batch for each child, by name; 1 for the others."""
        encoders = [self.backbone, self.teachers().get("backbone")]
        return {name: self.bn_groups for name, child in self.named_children() if child in encoders}

    def synchronise_batch_norm(self, device: torch.device) -> None:
        """Compute batch statistics over the processes that share a group, and on GPUs over groups in one pass.

        Called once, by all processes.
        """
        across = self.groups_across_processes
        synchronise_in_groups(self, device, self.batch_norm_groups(), across_processes=across)
