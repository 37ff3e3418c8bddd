"""The memory-bank mechanism, with which MoCo is compared: the keys are stored embeddings of all images.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020, arXiv:1911.05722, figure 2b and
section 4.1. Encoder, head, views and loss are MoCo v1's; only the source of the keys differs.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import nn

from sslkit.methods.base import BatchInfo, Features, Method, Step, Views
from sslkit.methods.method_options import Fitted, MethodOptions, negatives_below
from sslkit.methods.moco_v1 import MoCoV1
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.parts.chance_loss import ChanceLoss, info_nce_chance_loss
from sslkit.parts.losses import info_nce_of_similarities, inner_products, unit_rows
from sslkit.parts.memory_bank import MemoryBank
from sslkit.parts.schedules import Progress


class MemoryBankOptions(MethodOptions):
    """Options of the memory-bank mechanism.

    Attributes:
        dim: Embedding width C.
        negatives: Number K of stored embeddings drawn for each query.
        temperature: Divides the similarities.
        bank_momentum: Weight of the old value when a stored embedding is updated (as in InstDisc).
        bn_groups: Groups of the global batch with batch statistics of their own. MoCo's runs have one group for each
            of their 8 GPUs; there is no official code of this mechanism. 1 is BatchNorm over the global batch.
    """

    dim: int = Field(default=128, strict=True, ge=1, le=65536)
    negatives: int = Field(default=65536, strict=True, ge=1, le=100_000_000)
    temperature: float = Field(default=0.07, gt=0.0)
    bank_momentum: float = Field(default=0.5, ge=0.0, le=1.0)
    bn_groups: int = Field(default=1, strict=True, ge=1)


class MemoryBankMechanism(Method):
    """Keys are stored embeddings of all images; the positive is the image's own from an earlier epoch (figure 2b).

    Keys are not shuffled: batch statistics cannot reveal a positive that was made in another batch (section 3.3).
    """

    Options = MemoryBankOptions
    paper_defaults, paper_runs = staticmethod(MoCoV1.paper_defaults), staticmethod(MoCoV1.paper_runs)
    heads = ("projector",)
    negatives = "bank"
    bank: MemoryBank

    def __init__(self, backbone: nn.Module, feature_dim: int, options: MemoryBankOptions) -> None:
        super().__init__()
        self.options = options
        self.backbone = backbone
        self.projector = nn.Linear(feature_dim, options.dim)
        self.bn_groups = options.bn_groups if has_batch_norm(backbone) else 1

    def set_num_samples(self, num_samples: int) -> None:
        self.bank = MemoryBank(num_samples, self.options.dim)

    @classmethod
    def fitted_options(cls, num_images: int, start: Progress, stated: Mapping[str, Any]) -> dict[str, Fitted]:
        negatives = negatives_below(num_images, most=65536)
        return {"negatives": Fitted(negatives, f"at most half of the {num_images} different images")}

    def student(self, views: Views) -> Features:
        return [self.backbone(views[0])]

    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        query = unit_rows(self.projector(student_features[0]))
        similarities = inner_products(query, self.bank.rows)
        positive = similarities.gather(1, batch.sample_ids[:, None])[:, 0]
        negatives = similarities.gather(1, self.bank.draw_noise(len(query), self.options.negatives))
        loss, accuracy = info_nce_of_similarities(positive, negatives, self.options.temperature)
        if self.training:
            self.bank.keep(batch.sample_ids, query)
        return Step(loss, {"accuracy": accuracy})

    def after_update(self, progress: Progress) -> dict[str, float]:
        self.bank.update_with_kept(self.options.bank_momentum)
        return {}

    def dictionaries(self) -> Mapping[str, MemoryBank]:
        return {"bank": self.bank}

    def chance_loss(self, batch_size: int) -> ChanceLoss:
        return info_nce_chance_loss(self.options.negatives, self.options.temperature, self.options.dim)
