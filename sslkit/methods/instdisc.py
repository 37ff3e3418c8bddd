"""InstDisc: Wu, Xiong, Yu, Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018.

arXiv:1805.01978. Every image is a class of its own, whose weight vector is a stored embedding of that image. For large
data the softmax over all images is too expensive, so noise-contrastive estimation takes its place.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslkit.distributed.collectives import mean_over_processes
from sslkit.methods.base import BatchInfo, Features, Method, PaperRun, Step, Views
from sslkit.methods.method_options import Fitted, MethodOptions, negatives_below
from sslkit.parts.backbone import Family
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.parts.chance_loss import ChanceLoss, softmax_chance_loss
from sslkit.parts.losses import inner_products, nce_against_noise, unit_rows
from sslkit.parts.memory_bank import MemoryBank
from sslkit.parts.schedules import Progress
from sslkit.parts.updates.host_value import HostValue


class InstDiscOptions(MethodOptions):
    """Options of InstDisc, defaults from section 3 and the official code.

    Attributes:
        dim: Embedding width C.
        loss: ``"nce"``, or ``"softmax"`` over all images (the official code's CIFAR-10 form).
        negatives: Noise samples K of a query under ``"nce"``.
        temperature: Divides the similarities (0.07; 0.1 on CIFAR-10). Below 0.0125, exp(1 / temperature) overflows.
        bank_momentum: Weight of the old value when a stored embedding is updated.
        bn_groups: Groups of the global batch with batch statistics of their own. The official code has one group per
            GPU and does not say how many GPUs; 1 is BatchNorm over the global batch.
    """

    dim: int = Field(default=128, strict=True, ge=1, le=65536)
    loss: Literal["nce", "softmax"] = "nce"
    negatives: int = Field(default=4096, strict=True, ge=1, le=10_000_000)
    temperature: float = Field(default=0.07, ge=0.0125)
    bank_momentum: float = Field(default=0.5, ge=0.0, le=1.0)
    bn_groups: int = Field(default=1, strict=True, ge=1)


class InstDisc(Method):
    """The paper's section 3. Only the first view is used."""

    Options = InstDiscOptions
    heads = ("projector",)
    negatives = "bank"
    bank: MemoryBank
    normaliser: Tensor

    def __init__(self, backbone: nn.Module, feature_dim: int, options: InstDiscOptions) -> None:
        super().__init__()
        self.options = options
        self.backbone = backbone
        self.projector = nn.Linear(feature_dim, options.dim)
        self.bn_groups = options.bn_groups if has_batch_norm(backbone) else 1
        self._estimated = HostValue()
        self.register_buffer("normaliser", torch.zeros(()))  # Z of eq. 4; 0 until the first batch estimates it

    def set_num_samples(self, num_samples: int) -> None:
        self.bank = MemoryBank(num_samples, self.options.dim)

    @classmethod
    def fitted_options(cls, num_images: int, start: Progress, stated: Mapping[str, Any]) -> dict[str, Fitted]:
        negatives = negatives_below(num_images, most=4096)
        return {"negatives": Fitted(negatives, f"at most half of the {num_images} different images")}

    def student(self, views: Views) -> Features:
        return [self.backbone(views[0])]

    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        sample_ids = batch.sample_ids
        query = unit_rows(self.projector(student_features[0]))
        logits = inner_products(query, self.bank.rows) / self.options.temperature
        loss = self.nce(logits, sample_ids) if self.options.loss == "nce" else cross_entropy(logits, sample_ids)
        if self.training:
            self.bank.keep(sample_ids, query)
        accuracy = (logits.argmax(dim=1) == sample_ids).float().mean()
        return Step(loss, {"accuracy": accuracy})

    def nce(self, logits: Tensor, sample_ids: Tensor) -> Tensor:
        """NCE of (B, n) logits; Z is estimated once, from the first batch, and kept."""
        noise = self.bank.draw_noise(len(logits), self.options.negatives)
        positive = logits.gather(1, sample_ids[:, None])[:, 0].exp()
        negatives = logits.gather(1, noise).exp()
        if self.training and not self._estimated.read(self.normaliser):
            seen = torch.cat([positive[:, None], negatives], dim=1)
            self.normaliser.copy_(mean_over_processes(seen.mean()) * len(self.bank.rows))
        return nce_against_noise(positive / self.normaliser, negatives / self.normaliser, 1 / len(self.bank.rows))

    def after_update(self, progress: Progress) -> dict[str, float]:
        self.bank.update_with_kept(self.options.bank_momentum)
        return {}

    def dictionaries(self) -> Mapping[str, MemoryBank]:
        return {"bank": self.bank}

    def chance_loss(self, batch_size: int) -> ChanceLoss:
        options = self.options
        if options.loss == "nce":  # the terms of the noise samples add 1
            return softmax_chance_loss(options.negatives, options.temperature, options.dim, extra=1.0)
        return softmax_chance_loss(len(self.bank.rows), options.temperature, options.dim)

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
