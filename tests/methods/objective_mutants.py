"""Methods with one error each in shuffling, pairs, loss or dictionary."""

from typing import Any

import torch
from methods.mutant_register import breaks
from torch import Tensor

from sslkit.distributed.collectives import exchange_rows
from sslkit.methods import BatchInfo
from sslkit.methods.base import Features, Step, Views
from sslkit.methods.byol import BYOL
from sslkit.methods.end_to_end import EndToEnd
from sslkit.methods.instdisc import InstDisc
from sslkit.methods.memory_bank_mechanism import MemoryBankMechanism
from sslkit.methods.moco_v1 import MoCoV1
from sslkit.methods.moco_v2 import MoCoV2
from sslkit.methods.moco_v3 import MoCoV3
from sslkit.methods.simclr import SimCLR
from sslkit.methods.swav import SwAV
from sslkit.parts.batch_slices import encode_in_slices, shuffle_views
from sslkit.parts.losses import (
    info_nce_with_queue,
    inner_products,
    nt_xent,
    swapped_prediction,
    unit_rows,
)
from sslkit.parts.schedules import Progress


@breaks("moco_v2", "tests", "key order")
class ShuffleNotUndone(MoCoV2):
    def teacher_in_slices(self, views: Views, slices: int, permutation: Any = None, *words: Any) -> Features:
        return encode_in_slices(self.teacher, shuffle_views(views, self.teacher_views, permutation), slices, *words)


@breaks("end_to_end", "tests", "key order")
class UndoneTheWrongWay(EndToEnd):
    def student_in_slices(self, views: Views, slices: int, permutation: Any = None, *words: Any) -> Features:
        shuffled = shuffle_views(views, self.student_key_views, permutation)
        query, key = encode_in_slices(self.student, shuffled, slices, *words)
        return [query, key if permutation is None else exchange_rows(key, permutation)]


@breaks("moco_v1", "doctor", "batch norm leak")
class ShuffleForgotten(MoCoV1):
    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.shuffle_keys = False


@breaks("moco_v2", "tests", "batch norm leak")
class ShuffledInsideTheGroups(MoCoV2):
    def teacher_in_slices(self, views: Views, slices: int, permutation: Any = None, *words: Any) -> Features:
        return super().teacher_in_slices(views, slices, None, *words)


@breaks("end_to_end", "tests", "batch norm leak")
class KeysNotShuffled(EndToEnd):
    student_key_views = ()


@breaks("moco_v3", "tests", "pairs")
class ViewMeetsItself(MoCoV3):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        return super().objective(student_features, teacher_features[::-1], batch, progress)


@breaks("moco_v3", "tests", "pairs")
class LabelsShifted(MoCoV3):
    def contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return super().contrast(query, key.roll(1, dims=0))


@breaks("instdisc", "tests", "pairs")
class MemoryOfAnother(InstDisc):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        return super().objective(student_features, teacher_features, BatchInfo(batch.sample_ids.roll(1)), progress)


@breaks("moco_v2", "doctor", "views used")
class TeacherSeesTheFirstView(MoCoV2):
    def teacher(self, views: Views) -> Features:
        return [self.teacher_backbone(views[0])]


@breaks("moco_v2", "tests", "loss level")
class TemperatureLeftOutOfV2(MoCoV2):
    def contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return info_nce_with_queue(query, key, self.queue.keys, 1.0)


@breaks("moco_v3", "tests", "loss level")
class ScaleLeftOut(MoCoV3):
    def contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        loss, accuracy = super().contrast(query, key)
        return loss / (2 * self.options.temperature), accuracy


@breaks("moco_v3", "tests", "loss level")
class OneDirectionOnly(MoCoV3):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        step = super().objective(student_features, teacher_features, batch, progress)
        return Step(step.loss / 2, step.metrics)


@breaks("simclr", "tests", "loss level")
class TemperatureLeftOutOfSimCLR(SimCLR):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        first, second = self.projector(torch.cat(student_features)).chunk(2)
        return Step(nt_xent(first, second, first, second, 1.0, 0)[0])


@breaks("end_to_end", "tests", "loss level")
class SummedOverTheBatch(EndToEnd):
    def contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        loss, accuracy = super().contrast(query, key)
        return len(query) * loss, accuracy


@breaks("memory_bank", "tests", "loss level")
class HalfTheNegatives(MemoryBankMechanism):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        drawn = self.bank.draw_noise
        self.bank.draw_noise = lambda batch, negatives: drawn(batch, negatives // 2)
        step = super().objective(student_features, teacher_features, batch, progress)
        del self.bank.draw_noise
        return step


@breaks("byol", "tests", "loss level")
class NotNormalised(BYOL):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        step = super().objective(student_features, teacher_features, batch, progress)
        return Step(step.loss / 2)


@breaks("swav", "tests", "loss level")
class TemperatureLeftOutOfSwAV(SwAV):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        embeddings = unit_rows(self.projector(torch.cat(student_features))).chunk(len(student_features))
        scores = [inner_products(embedding, unit_rows(self.prototypes.weight)) for embedding in embeddings]
        return Step(swapped_prediction([self.codes(scores[crop], crop) for crop in (0, 1)], scores, 1.0))


@breaks("instdisc", "tests", "loss level")
class TemperatureLeftOutOfInstDisc(InstDisc):
    def nce(self, logits: Tensor, sample_ids: Tensor) -> Tensor:
        return super().nce(logits * self.options.temperature, sample_ids)


@breaks("moco_v2", "doctor", "method contract")
class QueueNotFed(MoCoV2):
    def after_update(self, progress: Progress) -> dict[str, float]:
        self.new_keys = None
        return super().after_update(progress)


@breaks("moco_v1", "tests", "queue")
class QueriesQueued(MoCoV1):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        step = super().objective(student_features, teacher_features, batch, progress)
        self.new_keys = unit_rows(self.projector(student_features[0])).detach()
        return step


@breaks("instdisc", "doctor", "method contract")
class MemoriesStand(InstDisc):
    def after_update(self, progress: Progress) -> dict[str, float]:
        return {}


@breaks("moco_v1", "doctor", "first loss")
class KeysPointAway(MoCoV1):
    def teacher(self, views: Views) -> Features:
        return [-30 * features for features in super().teacher(views)]


@breaks("moco_v3", "doctor", "method contract")
class TeacherIsTheStudent(MoCoV3):
    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.teacher_backbone.module = self.backbone

    def after_update(self, progress: Progress) -> dict[str, float]:
        self.teacher_projector.update(self.projector, self.options.momentum)
        return {}


@breaks("moco_v1", "tests", "loss level")
class KeysNotNormalised(MoCoV1):
    def objective(
        self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
    ) -> Step:
        query, key = self.projector(student_features[0]), self.teacher_projector(teacher_features[0])
        self.new_keys = unit_rows(key)
        loss, accuracy = self.contrast(unit_rows(query), key)
        return Step(loss, {"accuracy": accuracy})


@breaks("moco_v2", "tests", "queue")
class SameRowsOverwritten(MoCoV2):
    def after_update(self, progress: Progress) -> dict[str, float]:
        logged = super().after_update(progress)
        self.queue.pointer.zero_()
        return logged


@breaks("byol", "tests", "teacher moves")
class MomentumFalls(BYOL):
    def after_update(self, progress: Progress) -> dict[str, float]:
        momentum = self.options.momentum - 0.5 * progress.fraction
        self.teacher_backbone.update(self.backbone, momentum)
        self.teacher_projector.update(self.projector, momentum)
        return {"momentum": momentum}


@breaks("moco_v3", "doctor", "gradient")
class PredictorFrozen(MoCoV3):
    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.predictor.requires_grad_(False)
