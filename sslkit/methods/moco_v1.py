"""MoCo v1: He, Fan, Wu, Xie, Girshick, "Momentum Contrast for Unsupervised Visual Representation Learning", 2020.

arXiv:1911.05722. A query is compared with its own key and with a queue of keys from earlier batches. The keys come from
a momentum teacher. The batch is shuffled before the teacher encodes it (shuffling BN), so that the batch statistics
cannot reveal which key belongs to which query.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from sslkit.distributed.collectives import gather_rows
from sslkit.methods.base import BatchInfo, Features, Method, PaperRun, Step, Views
from sslkit.methods.method_options import Fitted, MomentumOptions, fitted_bn_groups, negatives_below
from sslkit.parts.backbone import Family
from sslkit.parts.batch_slices import encode_each
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.parts.chance_loss import ChanceLoss, info_nce_chance_loss
from sslkit.parts.losses import info_nce_with_queue, unit_rows
from sslkit.parts.momentum_teacher import MomentumTeacher
from sslkit.parts.queue import KeyQueue
from sslkit.parts.schedules import Progress


class MoCoV1Options(MomentumOptions):
    """Options of MoCo v1, defaults from section 3.3 and the official code.

    Attributes:
        dim: Embedding width C.
        queue_size: Number of keys K in the dictionary.
        temperature: Divides the similarities.
        momentum: The teacher's momentum, constant.
        bn_groups: Groups of the global batch with batch statistics of their own: the paper's 8 GPUs. With fewer
            processes each runs several groups; with more, each process is a group.
        shuffle: Shuffle the keys among the BN groups (section 3.3). False is the paper's ablation, in which the batch
            statistics reveal the positive; not for training.
        symmetric: Use each view once as query and once as key; the two losses are added, and 2N keys are queued.
    """

    dim: int = Field(default=128, strict=True, ge=1, le=65536)
    queue_size: int = Field(default=65536, strict=True, ge=1, le=100_000_000)
    temperature: float = Field(default=0.07, gt=0.0)
    momentum: float = Field(default=0.999, ge=0.0, le=1.0)
    bn_groups: int = Field(default=8, strict=True, ge=1)
    shuffle: bool = True
    symmetric: bool = False


class MoCoV1(Method):
    """Algorithm 1 of the paper, with a linear head."""

    Options: ClassVar[type[MoCoV1Options]] = MoCoV1Options
    heads = ("projector",)
    negatives = "queue"

    def __init__(self, backbone: nn.Module, feature_dim: int, options: MoCoV1Options) -> None:
        super().__init__()
        self.options = options
        self.backbone = backbone
        self.projector = self.make_projector(feature_dim)
        self.teacher_backbone = MomentumTeacher(self.backbone, options.momentum_at)
        self.teacher_projector = MomentumTeacher(self.projector, options.momentum_at)
        self.queue = KeyQueue(options.queue_size, options.dim)
        self.bn_groups = options.bn_groups if has_batch_norm(backbone) else 1
        self.shuffle_keys = options.shuffle
        self.student_views = (0, 1) if options.symmetric else (0,)
        self.teacher_views = (0, 1) if options.symmetric else (1,)
        self.new_keys: Tensor | None = None

    def teachers(self) -> Mapping[str, MomentumTeacher]:
        return {"backbone": self.teacher_backbone, "projector": self.teacher_projector}

    def dictionaries(self) -> Mapping[str, KeyQueue]:
        return {"queue": self.queue}

    def make_projector(self, feature_dim: int) -> nn.Module:
        """The head from features (B, D) to embeddings (B, C)."""
        return nn.Linear(feature_dim, self.options.dim)

    def student(self, views: Views) -> Features:
        return encode_each((views[view] for view in self.student_views), self.backbone)

    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        queries = [unit_rows(self.projector(features)) for features in student_features]
        keys = [unit_rows(self.teacher_projector(features)) for features in teacher_features]
        # A query is compared with the other view's key; keys are in the order of the views.
        terms = [self.contrast(query, key) for query, key in zip(queries, reversed(keys), strict=True)]
        if self.training:
            self.new_keys = torch.cat([gather_rows(key) for key in keys])
        losses, accuracies = zip(*terms, strict=True)
        return Step(sum(losses), {"accuracy": sum(accuracies) / len(accuracies)})

    def contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, C) against their own keys (B, C) and the queue."""
        return info_nce_with_queue(query, key, self.queue.keys, self.options.temperature)

    def after_update(self, progress: Progress) -> dict[str, float]:
        if self.new_keys is not None:
            self.queue.push(self.new_keys)
            self.new_keys = None
        return self.update_teachers(progress)

    def chance_loss(self, batch_size: int) -> ChanceLoss:
        options = self.options
        return info_nce_chance_loss(options.queue_size, options.temperature, options.dim, scale=len(self.student_views))

    @classmethod
    def fitted_options(cls, num_images: int, start: Progress, stated: Mapping[str, Any]) -> dict[str, Fitted]:
        below = negatives_below(num_images, most=65536)
        queue = max(below, start.batch_size)
        why = f"at most half of the {num_images} different images: few keys are of the query's own image"
        return {
            "queue_size": Fitted(queue, why if queue == below else "one batch, the smallest queue there is"),
            "bn_groups": fitted_bn_groups(start.batch_size),
            "symmetric": Fitted(True, "each view is query and key, at twice the computation"),
            **cls.Options.fitted_half_life(start),
        }

    def updates_to_fill_queue(self, batch_size: int) -> int:
        return math.ceil(self.options.queue_size / (batch_size * len(self.teacher_views)))

    @staticmethod
    def paper_defaults(family: Family) -> dict[str, dict[str, Any]]:
        return {
            "backbone": {"zero_init_last": False} if family == "resnet" else {},
            "views": {"policy": "moco_v1"},
            "optim": {"name": "sgd", "lr": 0.03, "weight_decay": 1e-4, "momentum": 0.9},
            "schedule": {"decay": "steps", "milestones": [120, 160], "per": "epoch"},
            "train": {"epochs": 200, "batch_size": 256},
        }

    @staticmethod
    def paper_runs(family: Family) -> Sequence[PaperRun]:
        return [PaperRun({"epochs": 200}, {"schedule": {"milestones": [120, 160]}})]
