"""SimCLR: Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations".

arXiv:2002.05709, 2020. Two views of every image go through one encoder in one batch. The positive of an embedding is
the other view's; its negatives are all other embeddings of the global batch. No teacher and no queue.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import nn

from sslkit.distributed.collectives import gather_rows_with_gradient, rank
from sslkit.methods.base import BatchInfo, Features, Method, Step, Views
from sslkit.methods.method_options import Fitted, MethodOptions
from sslkit.parts.backbone import Family
from sslkit.parts.batch_slices import encode_together
from sslkit.parts.chance_loss import ChanceLoss, info_nce_chance_loss
from sslkit.parts.heads import simclr_head
from sslkit.parts.losses import nt_xent
from sslkit.parts.schedules import Progress


class SimCLROptions(MethodOptions):
    """Options of SimCLR, defaults from section 2.2 and the official code.

    Attributes:
        dim: Embedding width C.
        hidden_dim: Width inside the projector; 0 means the backbone's own feature width, as in the paper.
        projector_layers: Linear layers of the projector: 2, or 3 as in SimCLR v2 (arXiv:2006.10029).
        temperature: Divides the similarities (0.1; the paper takes 0.5 on CIFAR-10).
    """

    dim: int = Field(default=128, strict=True, ge=1, le=65536)
    hidden_dim: int = Field(default=0, strict=True, ge=0, le=65536)
    projector_layers: int = Field(default=2, strict=True, ge=2, le=10)
    temperature: float = Field(default=0.1, gt=0.0)


class SimCLR(Method):
    """Algorithm 1 of the paper."""

    Options = SimCLROptions
    heads = ("projector",)
    negatives = "batch"
    shardable = True
    smallest_batch = 256

    def __init__(self, backbone: nn.Module, feature_dim: int, options: SimCLROptions) -> None:
        super().__init__()
        self.options = options
        self.backbone = backbone
        hidden_dim = options.hidden_dim or feature_dim
        self.projector = simclr_head(feature_dim, hidden_dim, options.dim, num_layers=options.projector_layers)

    def student(self, views: Views) -> Features:
        return encode_together(views, self.backbone)

    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        first, second = self.projector(torch.cat(student_features)).chunk(2)
        everyones = gather_rows_with_gradient(first), gather_rows_with_gradient(second)
        first_label = rank() * len(first)
        loss, accuracy = nt_xent(first, second, *everyones, self.options.temperature, first_label)
        return Step(loss, {"accuracy": accuracy})

    @classmethod
    def fitted_options(cls, num_images: int, start: Progress, stated: Mapping[str, Any]) -> dict[str, Fitted]:
        return {"temperature": Fitted(0.2, "a batch has few negatives; the paper's 0.1 is for thousands")}

    def chance_loss(self, batch_size: int) -> ChanceLoss:
        return info_nce_chance_loss(2 * batch_size - 2, self.options.temperature, self.options.dim, scale=2)

    @staticmethod
    def paper_defaults(family: Family) -> dict[str, dict[str, Any]]:
        return {
            "backbone": {"zero_init_last": True} if family == "resnet" else {},
            "views": {"policy": "simclr"},
            "optim": {"name": "lars_simclr", "lr": 0.3, "weight_decay": 1e-6, "momentum": 0.9},
            "schedule": {"decay": "cosine", "warmup_epochs": 10, "per": "step"},
            "train": {"epochs": 100, "batch_size": 4096},
        }
