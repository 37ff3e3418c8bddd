"""SimSiam: Chen, He, "Exploring Simple Siamese Representation Learning", 2021, arXiv:2011.10566.

Two views, one network, a predictor, and a stop-gradient. No negatives and no teacher.
"""

from typing import Any

from pydantic import Field
from torch import nn
from torch.nn.functional import cosine_similarity

from sslkit.methods import BatchInfo, Family, Features, Method, MethodOptions, Progress, Step
from sslkit.parts.heads import batch_norm_mlp


class SimSiamOptions(MethodOptions):
    """Options of SimSiam, defaults from section 3.

    Attributes:
        dim: Width of projector and output.
        bottleneck: Width inside the predictor.
    """

    dim: int = Field(default=2048, ge=1)
    bottleneck: int = Field(default=512, ge=1)


class SimSiam(Method):
    """Algorithm 1 of the paper."""

    Options = SimSiamOptions
    heads = ("projector", "predictor")
    stops_gradient = True

    def __init__(self, backbone: nn.Module, feature_dim: int, options: SimSiamOptions) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = batch_norm_mlp(feature_dim, options.dim, options.dim, num_layers=3, last_norm=True)
        self.predictor = nn.Sequential(
            nn.Linear(options.dim, options.bottleneck, bias=False),
            nn.BatchNorm1d(options.bottleneck),
            nn.ReLU(inplace=True),
            nn.Linear(options.bottleneck, options.dim),
        )

    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        z1, z2 = (self.projector(features) for features in student_features)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        similarity = (cosine_similarity(p1, z2.detach()) + cosine_similarity(p2, z1.detach())).mean() / 2
        return Step(-similarity, {"similarity": similarity.detach()})

    @staticmethod
    def paper_defaults(family: Family) -> dict[str, dict[str, Any]]:
        return {
            "views": {"policy": "moco_v2"},
            "optim": {"name": "sgd", "lr": 0.05, "weight_decay": 1e-4, "momentum": 0.9},
            "schedule": {"decay": "cosine", "per": "epoch"},
            "train": {"epochs": 100, "batch_size": 512},
        }
