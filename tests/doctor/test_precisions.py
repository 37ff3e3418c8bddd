"""The doctor on losses that compute in a coarser precision than its float64: no false fault, and true ones found."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_recipe
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from sslkit.data.sources.image_source import ImageSource, open_source
from sslkit.doctor.method_checks import examine_wiring
from sslkit.doctor.objective_probe import DERIVATIVE
from sslkit.methods import METHODS, BatchInfo, Step
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


@pytest.fixture(scope="module")
def source() -> ImageSource:
    return open_source(small_recipe().data).without_labels()


def verdict(method: type[SimCLR], source: ImageSource, patch: pytest.MonkeyPatch) -> dict[str, str]:
    patch.setitem(METHODS, "simclr", method)
    recipe = small_recipe("simclr", "test_vit", train={"batch_size": 8})
    findings = examine_wiring(recipe, source, lambda _: None)[0]
    assert not [finding for finding in findings if "could not be checked" in finding.sentence]
    return {finding.check: finding.verdict for finding in findings if finding.verdict in ("fault", "warning")}


@pytest.mark.parametrize("name", CASTS)
def test_a_coarse_loss_is_no_fault(name: str, source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict(losing(CASTS[name], cut=False), source, monkeypatch) == {}


@pytest.mark.parametrize("name", CASTS)
def test_a_cut_gradient_is_found_all_the_same(name: str, source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict(losing(CASTS[name], cut=True), source, monkeypatch) == {DERIVATIVE: "fault"}


@pytest.mark.parametrize("cut", [False, True])
def test_rounding_that_cannot_be_prevented_is_measured(
    cut: bool, source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    lossy = losing(lambda x: x, cut=cut, softmax=RoundedSoftmax.apply)
    assert verdict(lossy, source, monkeypatch) == ({DERIVATIVE: "fault"} if cut else {})
