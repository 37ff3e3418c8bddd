"""The classic mistakes, each injected, each caught: a suite that cannot fail proves nothing."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import test_against_oracle as moco
import test_compared_methods as compared
import torch
from torch import Tensor, nn

from sslkit.methods import base, moco_v1
from sslkit.methods.byol import BYOL
from sslkit.methods.end_to_end import EndToEnd
from sslkit.methods.moco_v1 import MoCoV1
from sslkit.methods.moco_v3 import MoCoV3
from sslkit.methods.swav import SwAV
from sslkit.parts.layerwise_optimizers import Larc, Lars
from sslkit.parts.memory_bank import MemoryBank
from sslkit.parts.momentum_teacher import MomentumTeacher

Patch = pytest.MonkeyPatch


def v2() -> None:
    moco.test_queue_methods_follow_the_oracle("moco_v2")


def v3() -> None:
    moco.test_v3_follows_the_oracle("test_resnet")


def byol() -> None:
    compared.test_byol("test_resnet")


def positive_among_negatives(patch: Patch) -> None:
    """Keys are queued before the loss."""
    contrast = moco_v1.info_nce_with_queue

    def leaking(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return contrast(query, key, torch.cat([queue, key]), temperature)

    patch.setattr(moco_v1, "info_nce_with_queue", leaking)


def teacher_in_eval_mode(patch: Patch) -> None:
    forward = MomentumTeacher.forward
    patch.setattr(MomentumTeacher, "forward", lambda self, *args: forward(self.eval(), *args))


def buffers_averaged(patch: Patch) -> None:
    update = MomentumTeacher.update

    def averaging(self: MomentumTeacher, student: nn.Module, momentum: float) -> None:
        update(self, student, momentum)
        for own, theirs in zip(self.module.buffers(), student.buffers(), strict=True):
            if own.is_floating_point():
                own.lerp_(theirs, 1 - momentum)

    patch.setattr(MomentumTeacher, "update", averaging)


def teacher_moved_twice(patch: Patch) -> None:
    update = MomentumTeacher.update

    def twice(self: MomentumTeacher, student: nn.Module, momentum: float) -> None:
        update(self, student, momentum)
        update(self, student, momentum)

    patch.setattr(MomentumTeacher, "update", twice)


def teacher_moved_before_the_optimizer(patch: Patch) -> None:
    """The teacher of a step is one update behind."""
    update, last = MomentumTeacher.update, {}

    def late(self: MomentumTeacher, student: nn.Module, momentum: float) -> None:
        update(self, last.get(id(self), student), momentum)
        last[id(self)] = copy.deepcopy(student)

    patch.setattr(MomentumTeacher, "update", late)


def two_tau_left_out(patch: Patch) -> None:
    contrast = MoCoV3.contrast

    def unscaled(self: MoCoV3, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        loss, accuracy = contrast(self, query, key)
        return loss / (2 * self.options.temperature), accuracy

    patch.setattr(MoCoV3, "contrast", unscaled)


def averaged_instead_of_summed(method: type[base.Method]) -> Callable[[Patch], None]:
    def inject(patch: Patch) -> None:
        objective = method.objective

        def halved(self: Any, *args: Any) -> base.Step:
            step = objective(self, *args)
            return base.Step(step.loss / 2, step.metrics)

        patch.setattr(method, "objective", halved)

    return inject


def decay_on_biases(patch: Patch) -> None:
    adapted = Lars.adapted

    def decaying(self: Lars, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        grads = [
            grad + group["weight_decay"] * param if param.ndim < 2 else grad
            for param, grad in zip(params, grads, strict=True)
        ]
        return adapted(self, params, grads, group)

    patch.setattr(Lars, "adapted", decaying)


def rate_outside_the_momentum(patch: Patch) -> None:
    """SimCLR trained with MoCo v3's LARS: the same only while the rate stays."""
    init = Lars.__init__

    def plain(self: Lars, *args: Any, rate_in_momentum: bool = False, **kwargs: Any) -> None:
        init(self, *args, rate_in_momentum=False, **kwargs)

    patch.setattr(Lars, "__init__", plain)


def larc_spares_vectors(patch: Patch) -> None:
    adapted = Larc.adapted

    def sparing(self: Larc, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        with_decay, without = (
            adapted(self, params, grads, {**group, "weight_decay": decay}) for decay in (group["weight_decay"], 0.0)
        )
        return [
            each if param.ndim > 1 else other for param, each, other in zip(params, with_decay, without, strict=True)
        ]

    patch.setattr(Larc, "adapted", sparing)


def shuffle_not_undone(patch: Patch) -> None:
    exchange = base.exchange_rows
    patch.setattr(
        base, "exchange_rows", lambda rows, permutation: rows if rows.ndim == 2 else exchange(rows, permutation)
    )


def keys_without_gradient(patch: Patch) -> None:
    """End-to-end that has become momentum-free MoCo."""
    contrast = EndToEnd.contrast
    patch.setattr(EndToEnd, "contrast", lambda self, query, key: contrast(self, query, key.detach()))


def backbone_cut_off(patch: Patch) -> None:
    """A detach on the online side: heads learn, the backbone does not."""
    student = BYOL.student
    patch.setattr(BYOL, "student", lambda self, views: [each.detach() for each in student(self, views)])


def own_key_of_the_same_view(patch: Patch) -> None:
    """q1 against k1: the two views are never compared."""
    objective = MoCoV3.objective

    def crossed(self: MoCoV3, student: Any, teacher: Any, *others: Any) -> Any:
        return objective(self, student, teacher[::-1], *others)

    patch.setattr(MoCoV3, "objective", crossed)


def prototypes_not_normalised(patch: Patch) -> None:
    patch.setattr(SwAV, "normalise_prototypes", lambda self: None)


def prototypes_never_frozen(patch: Patch) -> None:
    patch.setattr(SwAV, "before_update", lambda self, progress: None)


def bank_not_normalised(patch: Patch) -> None:
    def update(self: MemoryBank, sample_ids: Tensor, embeddings: Tensor, momentum: float) -> None:
        self.rows[sample_ids] = momentum * self.rows[sample_ids] + (1 - momentum) * embeddings.detach()
        self.draws.add_(1)

    patch.setattr(MemoryBank, "update", update)


MISTAKES: list[tuple[Callable[[Patch], None], Callable[[], None]]] = [
    (positive_among_negatives, v2),
    (teacher_in_eval_mode, v2),
    (teacher_in_eval_mode, v3),
    (buffers_averaged, v2),
    (buffers_averaged, byol),
    (teacher_moved_twice, v2),
    (teacher_moved_twice, byol),
    (teacher_moved_before_the_optimizer, v3),
    (two_tau_left_out, v3),
    (averaged_instead_of_summed(MoCoV3), v3),
    (averaged_instead_of_summed(BYOL), byol),
    (averaged_instead_of_summed(MoCoV1), lambda: compared.test_symmetric_moco_v2("test_resnet")),
    (decay_on_biases, v3),
    (decay_on_biases, byol),
    (rate_outside_the_momentum, lambda: compared.test_simclr("test_resnet", 2)),
    (larc_spares_vectors, lambda: compared.test_swav("test_resnet", (32, 32, 16, 16, 16), 0)),
    (shuffle_not_undone, v2),
    (shuffle_not_undone, lambda: compared.test_end_to_end("test_resnet")),
    (keys_without_gradient, lambda: compared.test_end_to_end("test_vit")),
    (backbone_cut_off, byol),
    (own_key_of_the_same_view, v3),
    (prototypes_not_normalised, lambda: compared.test_swav("test_vit", (32,) * 4, 0)),
    (prototypes_never_frozen, lambda: compared.test_swav("test_vit", (32,) * 4, 0)),
    (bank_not_normalised, lambda: compared.test_memory_bank("test_vit")),
]


@pytest.mark.full
@pytest.mark.parametrize(("inject", "suite"), MISTAKES)
def test_a_classic_mistake_is_caught(
    inject: Callable[[Patch], None], suite: Callable[[], None], monkeypatch: Patch
) -> None:
    inject(monkeypatch)
    with pytest.raises(AssertionError):
        suite()
