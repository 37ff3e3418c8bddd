"""The end-to-end mechanism, with which MoCo is compared: the keys come from the same encoder as the queries.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020, arXiv:1911.05722, figure 2a and
section 4.1. Encoder, head, views and loss are MoCo v1's; only the source of the keys differs.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from sslkit.distributed.collectives import gather_rows_with_gradient, rank
from sslkit.methods.base import BatchInfo, Features, Method, Step
from sslkit.methods.method_options import Fitted, MethodOptions
from sslkit.methods.moco_v1 import MoCoV1
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.parts.chance_loss import ChanceLoss, info_nce_chance_loss
from sslkit.parts.losses import info_nce_in_batch
from sslkit.parts.schedules import Progress


class EndToEndOptions(MethodOptions):
    """Options of the end-to-end mechanism.

    Attributes:
        dim: Embedding width C.
        temperature: Divides the similarities.
        bn_groups: Groups of the global batch with batch statistics of their own; keys are shuffled across them, as
            the paper does for this mechanism too (section 3.3).
        symmetric: Add the loss with queries and keys exchanged.
    """

    dim: int = Field(default=128, strict=True, ge=1, le=65536)
    temperature: float = Field(default=0.07, gt=0.0)
    bn_groups: int = Field(default=8, strict=True, ge=1)
    symmetric: bool = False


class EndToEnd(Method):
    """The same encoder makes the keys, which are those of the batch; queries and keys have gradient (figure 2a)."""

    Options = EndToEndOptions
    paper_defaults, paper_runs = staticmethod(MoCoV1.paper_defaults), staticmethod(MoCoV1.paper_runs)
    heads = ("projector",)
    negatives = "batch"
    smallest_batch = 256
    shuffle_keys = True
    student_key_views = (1,)

    def __init__(self, backbone: nn.Module, feature_dim: int, options: EndToEndOptions) -> None:
        super().__init__()
        self.options = options
        self.backbone = backbone
        self.projector = nn.Linear(feature_dim, options.dim)
        self.bn_groups = options.bn_groups if has_batch_norm(backbone) else 1

    @classmethod
    def fitted_options(cls, num_images: int, start: Progress, stated: Mapping[str, Any]) -> dict[str, Fitted]:
        return {
            "bn_groups": Fitted(1, "the batch is too small to be divided"),
            "symmetric": Fitted(True, "each view is query and key: more is learnt from each image"),
        }

    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        query, key = (self.projector(features) for features in student_features)
        loss, accuracy = self.contrast(query, key)
        if self.options.symmetric:
            back, _ = self.contrast(key, query)
            loss = loss + back
        return Step(loss, {"accuracy": accuracy})

    def contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, C) of this process against the keys (N, C) of all, which carry gradient."""
        keys = gather_rows_with_gradient(key)
        return info_nce_in_batch(query, keys, self.options.temperature, first_label=rank() * len(query))

    def chance_loss(self, batch_size: int) -> ChanceLoss:
        options = self.options
        return info_nce_chance_loss(
            batch_size - 1, options.temperature, options.dim, scale=2 if options.symmetric else 1
        )
