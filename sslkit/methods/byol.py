"""BYOL: Grill, Strub, Altché, Tallec, Richemond et al., "Bootstrap Your Own Latent", 2020, arXiv:2006.07733.

No negatives. From one view the student (online network) predicts the projection that a momentum teacher (target
network) makes of the other view. The predictor and the teacher's slow moves prevent collapse.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field
from torch import nn

from sslkit.methods.base import BatchInfo, Features, Method, PaperRun, Step
from sslkit.methods.method_options import Fitted, MomentumOptions
from sslkit.parts.backbone import Family
from sslkit.parts.batch_slices import encode_each
from sslkit.parts.chance_loss import ChanceLoss
from sslkit.parts.heads import byol_mlp
from sslkit.parts.losses import regression_loss
from sslkit.parts.momentum_teacher import MomentumTeacher
from sslkit.parts.schedules import Progress


class BYOLOptions(MomentumOptions):
    """Options of BYOL, defaults from section 3.2 and the official code.

    Attributes:
        dim: Width C of projections and predictions.
        hidden_dim: Width inside projector and predictor.
        momentum: The teacher's momentum at the start (0.996 for 1000 epochs, 0.99 for 100 and 300).
    """

    dim: int = Field(default=256, strict=True, ge=1, le=65536)
    hidden_dim: int = Field(default=4096, strict=True, ge=1, le=65536)
    momentum: float = Field(default=0.996, ge=0.0, le=1.0)
    momentum_schedule: Literal["cosine", "constant"] = "cosine"


class BYOL(Method):
    """Algorithm 1 of the paper. The teacher starts as a copy; the authors saw no difference to other random weights."""

    Options = BYOLOptions
    heads = ("projector", "predictor")
    shardable = True
    smallest_batch = 256
    teacher_views = (0, 1)

    def __init__(self, backbone: nn.Module, feature_dim: int, options: BYOLOptions) -> None:
        super().__init__()
        self.options = options
        self.backbone = backbone
        self.projector = byol_mlp(feature_dim, options.hidden_dim, options.dim)
        self.predictor = byol_mlp(options.dim, options.hidden_dim, options.dim)
        self.teacher_backbone = MomentumTeacher(self.backbone, options.momentum_at)
        self.teacher_projector = MomentumTeacher(self.projector, options.momentum_at)

    def teachers(self) -> Mapping[str, MomentumTeacher]:
        return {"backbone": self.teacher_backbone, "projector": self.teacher_projector}

    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        prediction_1, prediction_2 = encode_each(student_features, self.projector, self.predictor)
        target_1, target_2 = encode_each(teacher_features, self.teacher_projector)
        loss = regression_loss(prediction_1, target_2) + regression_loss(prediction_2, target_1)
        return Step(loss, {"similarity": 1.0 - loss.detach() / 4.0})

    def after_update(self, progress: Progress) -> dict[str, float]:
        # The official schedule is at 0 for the move after the first update; MoCo v3's is one step further.
        return self.update_teachers(replace(progress, updates=progress.updates - 1))

    @classmethod
    def fitted_options(cls, num_images: int, start: Progress, stated: Mapping[str, Any]) -> dict[str, Fitted]:
        return {
            "hidden_dim": Fitted(1024, "the paper's width of 4096 is for a million images"),
            **MomentumOptions.fitted_half_life(start),
        }

    def chance_loss(self, batch_size: int) -> ChanceLoss:
        return ChanceLoss(4.0, "2 - 2 cos in both directions", self.options.dim)

    @staticmethod
    def paper_defaults(family: Family) -> dict[str, dict[str, Any]]:
        return {
            "backbone": {"zero_init_last": False} if family == "resnet" else {},
            "views": {"policy": "byol"},
            "optim": {"name": "lars", "lr": 0.2, "weight_decay": 1.5e-6, "momentum": 0.9},
            "schedule": {"decay": "cosine", "warmup_epochs": 10, "per": "step"},
            "train": {"epochs": 1000, "batch_size": 4096},
        }

    @staticmethod
    def paper_runs(family: Family) -> Sequence[PaperRun]:
        """The presets of the official code, by epochs: momentum, rate, decay."""
        presets = {40: (0.97, 0.45, 1e-6), 100: (0.99, 0.45, 1e-6), 300: (0.99, 0.3, 1e-6), 1000: (0.996, 0.2, 1.5e-6)}
        return [
            PaperRun({"epochs": epochs}, {"method": {"momentum": momentum}, "optim": {"lr": lr, "weight_decay": decay}})
            for epochs, (momentum, lr, decay) in presets.items()
        ]
