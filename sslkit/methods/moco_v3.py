"""MoCo v3: Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers", 2021, arXiv:2104.02057.

No queue: the keys are those of the global batch. Each view is once query and once key (symmetric loss), a predictor
follows the projector on the query's side only, and the teacher's momentum rises to 1. For ViTs the patch projection
keeps its random weights, which stabilises training.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from sslkit.distributed.collectives import gather_rows, rank
from sslkit.methods.base import BatchInfo, Features, Method, PaperRun, Step
from sslkit.methods.method_options import Fitted, MomentumOptions
from sslkit.parts.backbone import Family
from sslkit.parts.batch_slices import encode_each
from sslkit.parts.chance_loss import ChanceLoss, info_nce_chance_loss
from sslkit.parts.heads import batch_norm_mlp
from sslkit.parts.losses import info_nce_in_batch
from sslkit.parts.momentum_teacher import MomentumTeacher
from sslkit.parts.schedules import Progress


class MoCoV3Options(MomentumOptions):
    """Options of MoCo v3, defaults for ViT from section 3 and the official code; `paper_defaults` has ResNet's.

    Attributes:
        dim: Embedding width C.
        hidden_dim: Width inside projector and predictor.
        temperature: Divides the similarities (ViT 0.2, ResNet 1.0).
        momentum: The teacher's momentum at the start.
        projector_layers: Linear layers of the projector (ViT 3, ResNet 2).
        predictor_last_norm: Whether the predictor ends in a BatchNorm (ViT yes, ResNet no).
        predictor: False leaves the predictor out (the paper's ablation, table 2).
        head_norm: False leaves BatchNorm out of the heads (table 3).
    """

    dim: int = Field(default=256, strict=True, ge=1, le=65536)
    hidden_dim: int = Field(default=4096, strict=True, ge=1, le=65536)
    temperature: float = Field(default=0.2, gt=0.0)
    momentum: float = Field(default=0.99, ge=0.0, le=1.0)
    momentum_schedule: Literal["cosine", "constant"] = "cosine"
    projector_layers: int = Field(default=3, strict=True, ge=1, le=10)
    predictor_last_norm: bool = True
    predictor: bool = True
    head_norm: bool = True


class MoCoV3(Method):
    """Algorithm 1 of the paper."""

    Options = MoCoV3Options
    heads = ("projector", "predictor")
    negatives = "batch"
    shardable = True
    smallest_batch = 256
    teacher_views = (0, 1)

    def __init__(self, backbone: nn.Module, feature_dim: int, options: MoCoV3Options) -> None:
        super().__init__()
        self.options = options
        self.backbone = backbone
        self.projector = batch_norm_mlp(
            feature_dim,
            options.hidden_dim,
            options.dim,
            num_layers=options.projector_layers,
            last_norm=True,
            norm=options.head_norm,
        )
        self.predictor: nn.Module = nn.Identity()
        if options.predictor:
            self.predictor = batch_norm_mlp(
                options.dim,
                options.hidden_dim,
                options.dim,
                num_layers=2,
                last_norm=options.predictor_last_norm,
                norm=options.head_norm,
            )
        self.teacher_backbone = MomentumTeacher(self.backbone, options.momentum_at)
        self.teacher_projector = MomentumTeacher(self.projector, options.momentum_at)

    def teachers(self) -> Mapping[str, MomentumTeacher]:
        return {"backbone": self.teacher_backbone, "projector": self.teacher_projector}

    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        query_1, query_2 = encode_each(student_features, self.projector, self.predictor)
        key_1, key_2 = encode_each(teacher_features, self.teacher_projector)
        loss_1, accuracy_1 = self.contrast(query_1, key_2)
        loss_2, accuracy_2 = self.contrast(query_2, key_1)
        return Step(loss_1 + loss_2, {"accuracy": (accuracy_1 + accuracy_2) / 2})

    def contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, C) of this process against the keys (N, C) of all, scaled by 2 tau as in the paper."""
        temperature = self.options.temperature
        loss, accuracy = info_nce_in_batch(query, gather_rows(key), temperature, first_label=rank() * len(query))
        return 2 * temperature * loss, accuracy

    def after_update(self, progress: Progress) -> dict[str, float]:
        return self.update_teachers(progress)

    @classmethod
    def fitted_options(cls, num_images: int, start: Progress, stated: Mapping[str, Any]) -> dict[str, Fitted]:
        return {
            "hidden_dim": Fitted(1024, "the paper's width of 4096 is for a million images"),
            **MomentumOptions.fitted_half_life(start),
        }

    def chance_loss(self, batch_size: int) -> ChanceLoss:
        temperature = self.options.temperature
        return info_nce_chance_loss(batch_size - 1, temperature, self.options.dim, scale=2 * 2 * temperature)

    @staticmethod
    def paper_defaults(family: Family) -> dict[str, dict[str, Any]]:
        if family == "resnet":
            return {
                "method": {"temperature": 1.0, "projector_layers": 2, "predictor_last_norm": False},
                "backbone": {"zero_init_last": True},
                "views": {"policy": "moco_v3", "crop_scale": [0.2, 1.0]},
                "optim": {"name": "lars", "lr": 0.6, "weight_decay": 1e-6, "momentum": 0.9},
                "schedule": {"decay": "cosine", "warmup_epochs": 10, "per": "step"},
                "train": {"epochs": 100, "batch_size": 4096},
            }
        vit = {"init": "moco_v3", "pos_embed": "sincos2d", "freeze_patch_embed": True}
        return {
            "backbone": vit if family == "vit" else {},
            "views": {"policy": "moco_v3"},
            "optim": {"name": "adamw", "lr": 1.5e-4, "weight_decay": 0.1},
            "schedule": {"decay": "cosine", "warmup_epochs": 40, "per": "step"},
            "train": {"epochs": 300, "batch_size": 4096},
        }

    @staticmethod
    def paper_runs(family: Family) -> Sequence[PaperRun]:
        """ResNet's numbers by epochs: momentum, rate, decay. ViT's are the same at every length."""
        if family != "resnet":
            return ()
        presets = {100: (0.99, 0.6, 1e-6), 300: (0.99, 0.3, 1e-6), 1000: (0.996, 0.3, 1.5e-6)}
        return [
            PaperRun({"epochs": epochs}, {"method": {"momentum": momentum}, "optim": {"lr": lr, "weight_decay": decay}})
            for epochs, (momentum, lr, decay) in presets.items()
        ]
