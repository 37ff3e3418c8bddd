"""`ObjectiveProbe` on losses that lower its precision: no false error, and true ones found."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_recipe
from methods.objective_probe import ObjectiveProbe, assert_gradient
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from sslkit.methods import BatchInfo, Step
from sslkit.methods.base import Features
from sslkit.methods.simclr import SimCLR
from sslkit.parts.schedules import Progress

Cast = Callable[[Tensor], Tensor]


class RoundedSoftmax(torch.autograd.Function):
    """Cross-entropy of logits in NumPy's float32, out of reach of whoever changes types in PyTorch."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        rows = logits.detach().cpu().numpy().astype(np.float32)
        weights = np.exp(rows - rows.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        ctx.save_for_backward(torch.from_numpy(weights).to(logits), labels)
        own = weights[np.arange(len(rows)), labels.numpy()]
        return logits.new_tensor(float(-np.log(own).mean(dtype=np.float32)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        weights, labels = ctx.saved_tensors
        gradient = weights.clone()
        gradient[torch.arange(len(labels)), labels] -= 1
        return grads[0] * gradient / len(labels), None


CASTS: dict[str, Cast] = {
    "float64": lambda x: x,
    "float()": lambda x: x.float(),
    "to(float32)": lambda x: x.to(torch.float32),
    "to(dtype=)": lambda x: x.to(dtype=torch.float32),
    "type(float32)": lambda x: x.type(torch.float32),
    "bfloat16()": lambda x: x.bfloat16(),
    "half()": lambda x: x.half().float(),
    "product with a float32 tensor of its own": lambda x: x.float() * torch.ones(1, dtype=torch.float32),
}


def losing(cast: Cast, *, cut: bool, softmax: Callable[[Tensor, Tensor], Tensor] = cross_entropy) -> type[SimCLR]:
    """SimCLR whose loss works in another precision; ``cut``: without the gradient of what each row is compared with."""

    class Lossy(SimCLR):
        def objective(
            self, student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress
        ) -> Step:
            rows = normalize(cast(self.projector(torch.cat(student_features))), dim=1)
            others = rows.detach() if cut else rows
            logits = (rows @ others.T / self.options.temperature).fill_diagonal_(-1e4)
            twins = torch.arange(len(rows)).roll(len(rows) // 2)
            return Step(2 * softmax(logits, twins).to(student_features[0]))

    return Lossy


def check_gradient_of(method: type[SimCLR]) -> None:
    options = small_recipe("simclr", "test_vit").method
    assert_gradient(ObjectiveProbe(method, options, num_student=2, num_teacher=0))


@pytest.mark.parametrize("name", CASTS)
def test_low_precision_is_no_error(name: str) -> None:
    check_gradient_of(losing(CASTS[name], cut=False))


@pytest.mark.parametrize("name", CASTS)
def test_a_missing_gradient_is_found_all_the_same(name: str) -> None:
    with pytest.raises(AssertionError, match="off the slope"):
        check_gradient_of(losing(CASTS[name], cut=True))


def test_rounding_that_cannot_be_prevented_is_measured() -> None:
    check_gradient_of(losing(lambda x: x, cut=False, softmax=RoundedSoftmax.apply))
    with pytest.raises(AssertionError, match="off the slope"):
        check_gradient_of(losing(lambda x: x, cut=True, softmax=RoundedSoftmax.apply))
