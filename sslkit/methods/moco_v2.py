"""MoCo v2: Chen, Fan, Girshick, He, "Improved Baselines with Momentum Contrastive Learning", 2020, arXiv:2003.04297.

MoCo v1 with three changes taken from SimCLR's design: an MLP head, stronger views ("aug+": blur added), and a cosine
learning rate; the temperature rises to 0.2. The mechanism is v1's.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import nn

from sslkit.methods.base import PaperRun
from sslkit.methods.moco_v1 import MoCoV1, MoCoV1Options
from sslkit.parts.backbone import Family
from sslkit.parts.heads import mlp_head


class MoCoV2Options(MoCoV1Options):
    """Options of MoCo v2; those not listed are v1's.

    Attributes:
        hidden_dim: Width inside the MLP head; 0 means the backbone's own feature width, as in the paper.
        temperature: Divides the similarities.
    """

    hidden_dim: int = Field(default=0, strict=True, ge=0, le=65536)
    temperature: float = Field(default=0.2, gt=0.0)


class MoCoV2(MoCoV1):
    """MoCo v1's algorithm with an MLP head."""

    Options = MoCoV2Options
    options: MoCoV2Options

    def make_projector(self, feature_dim: int) -> nn.Module:
        return mlp_head(feature_dim, self.options.hidden_dim or feature_dim, self.options.dim)

    @staticmethod
    def paper_defaults(family: Family) -> dict[str, dict[str, Any]]:
        return {
            **MoCoV1.paper_defaults(family),
            "views": {"policy": "moco_v2"},
            "schedule": {"decay": "cosine", "per": "epoch"},
        }

    @staticmethod
    def paper_runs(family: Family) -> Sequence[PaperRun]:
        return ()  # 200 and 800 epochs have the same numbers
