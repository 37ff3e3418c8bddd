"""SwAV: Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, "Unsupervised Learning of Visual Features by Contrasting
Cluster Assignments", 2020, arXiv:2006.09882.

Embeddings are compared with learned prototypes. Sinkhorn-Knopp assigns codes to the two large crops, spread evenly over
the prototypes. The code of a crop is predicted from every other crop, large or small.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from sslkit.distributed.collectives import gather_rows, rank, world_size
from sslkit.methods.base import BatchInfo, Features, Method, PaperRun, Step, ViewCount, Views
from sslkit.methods.method_options import Fitted, MethodOptions, negatives_below
from sslkit.parts.backbone import Family
from sslkit.parts.batch_slices import encode_in_slices, encode_together, local_bn_groups
from sslkit.parts.batchnorm import GroupStatistics, can_divide, has_batch_norm
from sslkit.parts.chance_loss import ChanceLoss, softmax_chance_loss
from sslkit.parts.heads import swav_head
from sslkit.parts.losses import inner_products, sinkhorn_codes, swapped_prediction, unit_rows
from sslkit.parts.multicrop import encode_by_size
from sslkit.parts.queue import KeyQueue
from sslkit.parts.schedules import Progress
from sslkit.parts.updates.host_value import HostValue

ASSIGNMENT_CROPS = 2


def trimmed(queue_size: int, batch_size: int) -> int:
    """The largest multiple of the global batch that is no more than ``queue_size``: the rows of a queue in use."""
    return queue_size - queue_size % batch_size


class SwAVOptions(MethodOptions):
    """Options of SwAV, defaults from section 3 and the official scripts (batch 4096).

    Attributes:
        dim: Embedding width C.
        hidden_dim: Width inside the projector.
        prototypes: Number of prototypes P.
        temperature: Divides the scores.
        epsilon: Temperature of the codes.
        sinkhorn_iterations: Rounds of normalisation.
        freeze_prototypes_steps: Updates during which prototypes stay (313 at batch 4096, 5005 at 256).
        queue_size: Embeddings kept for small batches; 0 for none (3840 at batch 256). Used once it is full. Trimmed to
            a multiple of the global batch, as in the official code.
        queue_start_epoch: Epoch at which the queue starts to fill.
        bn_groups: Groups of the global batch with batch statistics of their own, of backbone and projector. The
            official scripts for batch 4096 synchronise BatchNorm within 8 GPUs of 64 images: 8 groups of 512 images.
            The script for batch 256 synchronises all: 1 group.
    """

    dim: int = Field(default=128, strict=True, ge=1, le=65536)
    hidden_dim: int = Field(default=2048, strict=True, ge=1, le=65536)
    prototypes: int = Field(default=3000, strict=True, ge=2, le=1_000_000)
    temperature: float = Field(default=0.1, gt=0.0)
    epsilon: float = Field(default=0.05, gt=0.0)
    sinkhorn_iterations: int = Field(default=3, strict=True, ge=1, le=1000)
    freeze_prototypes_steps: int = Field(default=313, strict=True, ge=0)
    queue_size: int = Field(default=0, strict=True, ge=0)
    queue_start_epoch: float = Field(default=15.0, ge=0.0)
    bn_groups: int = Field(default=1, strict=True, ge=1)


class SwAV(Method):
    """Algorithm 1 of the paper, with multi-crop (views after the second are small crops) and queue."""

    Options = SwAVOptions
    heads = ("projector",)
    stops_gradient = True
    views: ClassVar[Mapping[str, ViewCount]] = {"global": ASSIGNMENT_CROPS, "local": (0, None)}
    groups_across_processes = True
    queue_open: Tensor
    queue_filled: Tensor

    def __init__(self, backbone: nn.Module, feature_dim: int, options: SwAVOptions) -> None:
        super().__init__()
        self.options = options
        self.backbone = backbone
        self.projector = swav_head(feature_dim, options.hidden_dim, options.dim)
        self.prototypes = nn.Linear(options.dim, options.prototypes, bias=False)
        num_queues = ASSIGNMENT_CROPS if options.queue_size else 0
        self.queues = nn.ModuleList(KeyQueue(options.queue_size, options.dim) for _ in range(num_queues))
        self.register_buffer("queue_open", torch.tensor(options.queue_start_epoch == 0.0))
        self.register_buffer("queue_filled", torch.zeros((), dtype=torch.long))
        self._open, self._filled = HostValue(), HostValue()
        self.new_embeddings: list[Tensor] = []
        self.bn_groups = options.bn_groups if has_batch_norm(backbone) else 1

    def student(self, views: Views) -> Features:
        return encode_by_size(self.backbone, views)

    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        if self.training:
            self.normalise_prototypes()
        crops = len(student_features)
        embeddings = unit_rows(torch.cat(self.project(student_features))).chunk(crops)
        scores = [inner_products(embedding, self.prototypes.weight) for embedding in embeddings]
        codes = [self.codes(scores[crop], crop) for crop in range(ASSIGNMENT_CROPS)]
        if self.training:
            self.new_embeddings = [gather_rows(embeddings[crop]) for crop in range(len(self.queues))]
        loss = swapped_prediction(codes, scores, self.options.temperature)
        agreement = (scores[0].argmax(dim=1) == scores[1].argmax(dim=1)).float().mean()
        return Step(loss, {"agreement": agreement})

    def project(self, features: Features) -> Features:
        """Embeddings (B, C) of each crop's features. All crops of a BN group go through the projector together."""

        def project(crops: Views) -> Features:
            return encode_together(crops, self.projector)

        bn_groups = self.options.bn_groups
        groups = local_bn_groups(bn_groups)
        slices = 1 if can_divide(self.projector) else groups
        statistics = GroupStatistics([self.projector], slices, groups=groups // slices, average=bn_groups > 1)
        return encode_in_slices(project, features, slices, statistics=statistics)

    def batch_norm_groups(self) -> dict[str, int]:
        return {**super().batch_norm_groups(), "projector": self.options.bn_groups}

    @torch.no_grad()
    def normalise_prototypes(self) -> None:
        """Normalise every prototype to unit norm, in place."""
        self.prototypes.weight.copy_(unit_rows(self.prototypes.weight))

    @torch.no_grad()
    def codes(self, scores: Tensor, crop: int) -> Tensor:
        """Codes (B, P) from the scores of an assignment crop and, once the queue is full, of queued embeddings."""
        batch = len(scores)
        size = trimmed(self.options.queue_size, batch * world_size())
        if size and self._filled.read(self.queue_filled) >= size:
            queue = self.queue(crop).keys[:size][rank() :: world_size()]  # every process uses its share
            scores = torch.cat([inner_products(queue, self.prototypes.weight), scores])
        return sinkhorn_codes(scores, self.options.epsilon, self.options.sinkhorn_iterations)[-batch:]

    def dictionaries(self) -> Mapping[str, KeyQueue]:
        return {f"queues.{crop}": self.queue(crop) for crop in range(len(self.queues))}

    def chance_loss(self, batch_size: int) -> ChanceLoss:
        return softmax_chance_loss(self.options.prototypes, self.options.temperature, self.options.dim)

    @classmethod
    def fitted_options(cls, num_images: int, start: Progress, stated: Mapping[str, Any]) -> dict[str, Fitted]:
        fitting, epochs = negatives_below(num_images // 8, most=3000), start.total_updates / start.updates_per_epoch
        prototypes = stated.get("prototypes", fitting)  # codes need as many embeddings
        queue = trimmed(max(min(num_images // 4, 3840), prototypes, start.batch_size), start.batch_size)
        return {
            "prototypes": Fitted(fitting, f"{num_images // fitting} of the {num_images} different images for each"),
            "queue_size": Fitted(queue, "codes of a small batch need earlier embeddings"),
            "queue_start_epoch": Fitted(round(epochs / 10, 2), "after a tenth of the run"),
            "freeze_prototypes_steps": Fitted(
                min(start.updates_per_epoch, start.total_updates // 10), "an epoch at most"
            ),
        }

    def advise(self, start: Progress) -> Sequence[str]:
        options, batch, epochs = self.options, start.batch_size, start.total_updates / start.updates_per_epoch
        found = []
        if batch + options.queue_size < options.prototypes:
            found.append(
                f"codes share {batch} images and {options.queue_size} queued ones among {options.prototypes} "
                f"prototypes, less than one each: set method.queue_size = {15 * batch}, as in the paper's small runs"
            )
        if options.freeze_prototypes_steps > start.total_updates / 2:
            found.append(
                f"the prototypes are frozen for {options.freeze_prototypes_steps} of {start.total_updates} steps: set "
                f"method.freeze_prototypes_steps = {start.updates_per_epoch}, an epoch"
            )
        if options.queue_size and options.queue_start_epoch >= epochs:
            found.append(
                f"the queue starts at epoch {options.queue_start_epoch:g} of {epochs:g} and is never used: set "
                f"method.queue_start_epoch = {epochs / 10:g}"
            )
        return found

    def queue(self, crop: int) -> KeyQueue:
        """The queue of earlier embeddings of an assignment crop."""
        queue = self.queues[crop]
        assert isinstance(queue, KeyQueue)
        return queue

    def before_update(self, progress: Progress) -> None:
        if progress.updates < self.options.freeze_prototypes_steps:
            self.prototypes.weight.grad = None

    def after_update(self, progress: Progress) -> dict[str, float]:
        if self._open.read(self.queue_open):
            for crop, embeddings in enumerate(self.new_embeddings):
                self.queue(crop).push(embeddings, trimmed(self.options.queue_size, len(embeddings)))
            filled = self._filled.read(self.queue_filled) + sum(len(each) for each in self.new_embeddings[:1])
            self._filled.write(self.queue_filled, filled)
        self._open.write(self.queue_open, progress.epoch >= self.options.queue_start_epoch)
        return {}

    @staticmethod
    def paper_defaults(family: Family) -> dict[str, dict[str, Any]]:
        return {
            "backbone": {"zero_init_last": False} if family == "resnet" else {},
            "views": {"policy": "swav"},
            "optim": {"name": "larc", "lr": 4.8, "lr_rule": "none", "weight_decay": 1e-6, "momentum": 0.9},
            "schedule": {
                "decay": "cosine",
                "warmup_epochs": 10,
                "warmup_start": 0.0625,
                "final": 0.001,
                "per": "step",
            },
            "train": {"epochs": 800, "batch_size": 4096},
        }

    @staticmethod
    def paper_runs(family: Family) -> Sequence[PaperRun]:
        """The official scripts for 64 and for 4 GPUs; the learning rate is not scaled with the batch size."""
        large: dict[str, dict[str, Any]] = {
            "method": {"bn_groups": 8, "freeze_prototypes_steps": 313, "queue_size": 0},
            "optim": {"lr": 4.8},
            "schedule": {"warmup_epochs": 10, "warmup_start": 0.0625},
        }
        small: dict[str, dict[str, Any]] = {
            "method": {"bn_groups": 1, "freeze_prototypes_steps": 5005, "queue_size": 3840},
            "optim": {"lr": 0.6},
            "schedule": {"warmup_epochs": 0, "warmup_start": 0.0},
        }
        return [PaperRun({"batch_size": 4096}, large), PaperRun({"batch_size": 256}, small)]

    @classmethod
    def remark_on_batch(cls, options: SwAVOptions, batch_size: int) -> str:
        used = trimmed(options.queue_size, batch_size)
        if used == options.queue_size:
            return ""
        done = f"{used} rows are used" if used else "no queue is used"
        return (
            f"[method] queue_size: {options.queue_size} is not a multiple of [train] batch_size = {batch_size}; as in "
            f"the official code it is trimmed to one, so {done}"
        )
