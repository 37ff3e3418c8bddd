"""Methods with one error each in their queue, teacher or gradient."""

from typing import Any

import torch
from methods.mutant_register import breaks
from torch import Tensor
from torch.nn.functional import cross_entropy

from sslkit.distributed.collectives import gather_rows
from sslkit.methods import BatchInfo, Method
from sslkit.methods.base import Features, Step, Views
from sslkit.methods.byol import BYOL
from sslkit.methods.end_to_end import EndToEnd
from sslkit.methods.memory_bank_mechanism import MemoryBankMechanism
from sslkit.methods.moco_v1 import MoCoV1
from sslkit.methods.moco_v2 import MoCoV2
from sslkit.methods.moco_v3 import MoCoV3
from sslkit.methods.simclr import SimCLR
from sslkit.methods.swav import SwAV
from sslkit.parts.losses import (
    info_nce_in_batch,
    info_nce_with_queue,
    inner_products,
    nt_xent,
    regression_loss,
    swapped_prediction,
    unit_rows,
)
from sslkit.parts.schedules import Progress


@breaks("moco_v2", "doctor", "step")
class Crashes(MoCoV2):
    def contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return info_nce_with_queue(query, key, self.queue.keys.T, self.options.temperature)


@breaks("moco_v3", "doctor", "step")
class LossIsNotANumber(MoCoV3):
    def contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        loss, accuracy = super().contrast(query, key)
        return loss - torch.tensor(torch.inf), accuracy


@breaks("moco_v2", "doctor", "method contract")
class KeysQueuedBeforeTheLoss(MoCoV2):
    def contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        self.queue.push(gather_rows(key))
        return super().contrast(query, key)


@breaks("moco_v1", "tests", "positive")
class KeysAlsoAmongNegatives(MoCoV1):
    def contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return info_nce_with_queue(query, key, torch.cat([self.queue.keys, key]), self.options.temperature)


@breaks("moco_v2", "tests", "positive")
class NewestKeysOverlaid(MoCoV2):
    """Negatives without a push: the newest keys stand where the oldest were, for this loss only."""

    def contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        negatives = torch.cat([key, self.queue.keys[len(key) :]])
        return info_nce_with_queue(query, key, negatives, self.options.temperature)


@breaks("simclr", "tests", "positive")
class FindsItself(SimCLR):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        first, second = (unit_rows(z) for z in self.projector(torch.cat(student_features)).chunk(2))
        everyone, twins = torch.cat([first, second]), torch.arange(2 * len(first)).roll(len(first))
        logits = inner_products(everyone, everyone) / self.options.temperature
        return Step(2 * cross_entropy(logits, twins))


@breaks("memory_bank", "doctor", "method contract")
class MemoriesMovedBeforeTheLoss(MemoryBankMechanism):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        query = unit_rows(self.projector(student_features[0])).detach()
        self.bank.update(batch.sample_ids, query, self.options.bank_momentum)
        return super().objective(student_features, teacher_features, batch, progress)


@breaks("moco_v3", "doctor", "method contract")
class TeacherLearns(MoCoV3):
    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.teacher_backbone.requires_grad_(True)


@breaks("byol", "doctor", "method contract")
class TeacherHeadLearns(BYOL):
    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.teacher_projector.requires_grad_(True)


@breaks("moco_v2", "tests", "teacher moves")
class TeacherMovesInForward(MoCoV2):
    def teacher(self, views: Views) -> Features:
        self.teacher_backbone.update(self.backbone, self.options.momentum)
        return super().teacher(views)


@breaks("moco_v3", "tests", "teacher moves")
class TeacherHeadForgotten(MoCoV3):
    def after_update(self, progress: Progress) -> dict[str, float]:
        self.teacher_backbone.update(self.backbone, self.options.momentum)
        return {"momentum": self.options.momentum}


@breaks("byol", "tests", "teacher moves")
class TeacherForgotten(BYOL):
    def after_update(self, progress: Progress) -> dict[str, float]:
        return {"momentum": self.options.momentum}


@breaks("moco_v3", "tests", "teacher moves")
class MomentumTurnedRound(MoCoV3):
    def after_update(self, progress: Progress) -> dict[str, float]:
        momentum = 1 - self.options.momentum
        self.teacher_backbone.update(self.backbone, momentum)
        self.teacher_projector.update(self.projector, momentum)
        return {"momentum": momentum}


@breaks("byol", "tests", "teacher moves")
class StudentFollows(BYOL):
    def after_update(self, progress: Progress) -> dict[str, float]:
        logged = super().after_update(progress)
        with torch.no_grad():
            for own, theirs in zip(self.projector.parameters(), self.teacher_projector.parameters(), strict=True):
                own.lerp_(theirs, 1e-3)
        return logged


@breaks("moco_v2", "tests", "teacher statistics")
class StatisticsAveraged(MoCoV2):
    def after_update(self, progress: Progress) -> dict[str, float]:
        for own, theirs in zip(self.teacher_backbone.buffers(), self.backbone.buffers(), strict=True):
            if own.is_floating_point():
                own.lerp_(theirs + 0.01, 0.5)
        return super().after_update(progress)


@breaks("moco_v1", "tests", "teacher copied")
class TeacherDrawnAnew(MoCoV1):
    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        for param in self.teacher_backbone.parameters():
            param.mul_(1.5)


@breaks("moco_v2", "tests", "teacher used")
class StudentsHeadMakesTheKeys(MoCoV2):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        query, key = (unit_rows(self.projector(each[0])) for each in (student_features, teacher_features))
        loss, accuracy = self.contrast(query, key.detach())
        self.new_keys = gather_rows(key)
        return Step(loss, {"accuracy": accuracy})


@breaks("moco_v3", "tests", "teacher used")
class TeacherInEvalMode(MoCoV3):
    def train(self, mode: bool = True) -> Method:
        super().train(mode)
        self.teacher_backbone.eval()
        return self


@breaks("moco_v3", "doctor", "method contract")
class StudentMakesTheKeys(MoCoV3):
    def teacher(self, views: Views) -> Features:
        return [self.backbone(view) for view in views]


@breaks("byol", "tests", "stop-gradient")
class TargetsThroughTheStudentsHead(BYOL):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        predictions = [self.predictor(self.projector(features)) for features in student_features]
        targets = [unit_rows(self.projector(features)) for features in reversed(teacher_features)]
        pairs = zip(predictions, targets, strict=True)
        return Step(sum(2 - 2 * (unit_rows(one) * other).sum(dim=1).mean() for one, other in pairs))


@breaks("swav", "tests", "gradient")
class CodesCarryGradient(SwAV):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        embeddings = unit_rows(self.projector(torch.cat(student_features))).chunk(len(student_features))
        scores = [inner_products(embedding, unit_rows(self.prototypes.weight)) for embedding in embeddings]
        codes = [(each / self.options.epsilon).softmax(dim=1) for each in scores[:2]]
        return Step(swapped_prediction(codes, scores, self.options.temperature))


@breaks("byol", "doctor", "gradient")
class PredictorDetached(BYOL):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        predictions = [self.predictor(self.projector(features).detach()) for features in student_features]
        targets = [self.teacher_projector(features) for features in reversed(teacher_features)]
        return Step(sum(regression_loss(one, other) for one, other in zip(predictions, targets, strict=True)))


@breaks("moco_v3", "doctor", "gradient")
class PredictorLeftOut(MoCoV3):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        queries = [self.projector(features) for features in student_features]
        keys = [self.teacher_projector(features) for features in reversed(teacher_features)]
        return Step(sum(self.contrast(query, key)[0] for query, key in zip(queries, keys, strict=True)))


@breaks("moco_v1", "doctor", "gradient")
class FeaturesDetached(MoCoV1):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        return super().objective([each.detach() for each in student_features], teacher_features, batch, progress)


@breaks("simclr", "doctor", "gradient")
class LossDetached(SimCLR):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        return Step(super().objective(student_features, teacher_features, batch, progress).loss.detach())


@breaks("end_to_end", "doctor", "gradient")
class KeysWithoutGradient(EndToEnd):
    def contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return info_nce_in_batch(query, gather_rows(key), self.options.temperature, first_label=0)


@breaks("simclr", "tests", "gradient")
class GatherWithoutGradient(SimCLR):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        first, second = self.projector(torch.cat(student_features)).chunk(2)
        everyones = gather_rows(first), gather_rows(second)
        return Step(nt_xent(first, second, *everyones, self.options.temperature, 0)[0])
