"""The two mechanisms that MoCo is compared with: end-to-end and memory bank.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020, arXiv:1911.05722, figure 2 and
section 4.1. Encoder, head, views and loss are MoCo v1's; only the source of the keys differs.
"""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn

from sslkit.distributed.collectives import gather_rows_with_gradient, rank
from sslkit.methods.base import BatchInfo, Features, Method, MethodOptions, Step, Views
from sslkit.methods.moco_v1 import MoCoV1
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.parts.chance_loss import ChanceLoss, info_nce_chance
from sslkit.parts.losses import info_nce_in_batch, info_nce_of_similarities, inner_products, unit_rows
from sslkit.parts.memory_bank import MemoryBank
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
        return info_nce_chance(batch_size - 1, options.temperature, options.dim, scale=2 if options.symmetric else 1)


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
        return info_nce_chance(self.options.negatives, self.options.temperature, self.options.dim)
