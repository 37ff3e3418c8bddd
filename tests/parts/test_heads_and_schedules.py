"""Heads by their parameter counts, names and initial spread; schedules by their golden values."""

import math

import pytest
import torch
from golden import heads as paper
from golden.arithmetic import head_parameter_counts
from golden.byol import byol_predictor, byol_projector
from golden.simclr import simclr_projector
from golden.swav import swav_projector
from torch import nn

from sslkit.parts.heads import batch_norm_mlp, byol_mlp, mlp_head, simclr_head, swav_head
from sslkit.parts.schedules import cosine, per_epoch, warmup_then_cosine, warmup_then_steps

OURS = {
    "v1": (lambda: nn.Linear(2048, 128), paper.v1_head),
    "v2": (lambda: mlp_head(2048, 2048, 128), paper.v2_head),
    "v3_r50_projector": (
        lambda: batch_norm_mlp(2048, 4096, 256, num_layers=2, last_norm=True),
        paper.v3_r50_projector,
    ),
    "v3_vit_s_projector": (
        lambda: batch_norm_mlp(384, 4096, 256, num_layers=3, last_norm=True),
        paper.v3_vit_projector,
    ),
    "v3_r50_predictor": (
        lambda: batch_norm_mlp(256, 4096, 256, num_layers=2, last_norm=False),
        paper.v3_r50_predictor,
    ),
    "v3_vit_predictor": (lambda: batch_norm_mlp(256, 4096, 256, num_layers=2, last_norm=True), paper.v3_vit_predictor),
}


@pytest.mark.parametrize("name", OURS)
def test_head_is_the_papers(name: str) -> None:
    ours, theirs = (make() for make in OURS[name])
    assert sum(param.numel() for param in ours.parameters()) == head_parameter_counts()[name]
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    for layer in ours.modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(3 * layer.in_features), rel=0.02)


@pytest.mark.parametrize(
    ("ours", "theirs", "count"),
    [
        (byol_mlp(2048, 4096, 256), byol_projector(), 9_449_472),
        (byol_mlp(256, 4096, 256), byol_predictor(), 2_109_440),
        (swav_head(2048, 2048, 128), swav_projector(), 4_846_720 - 3000 * 128),
        (simclr_head(2048, 2048, 128, num_layers=2), simclr_projector(layers=2), None),
        (simclr_head(2048, 2048, 128, num_layers=3), simclr_projector(layers=3), None),
    ],
)
def test_compared_heads_are_the_papers(ours: nn.Module, theirs: nn.Module, count: int | None) -> None:
    assert count in (None, sum(param.numel() for param in ours.parameters()))
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    trained = [param.requires_grad for param in ours.parameters()]
    assert trained == [param.requires_grad for param in theirs.parameters()]


def test_v2_head_has_no_batch_norm_and_v3_last_norm_no_scale() -> None:
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in mlp_head(8, 8, 4).modules())
    last = batch_norm_mlp(8, 16, 4, num_layers=3, last_norm=True)[-1]
    assert isinstance(last, nn.BatchNorm1d)
    assert not last.affine


@pytest.mark.parametrize(
    ("epoch", "momentum"),
    [(0, 0.99), (1, 0.9900024672), (25, 0.9914644661), (50, 0.995), (75, 0.9985355339), (99, 0.9999975328), (100, 1)],
)
def test_momentum_schedule(epoch: int, momentum: float) -> None:
    assert cosine(epoch, 100, 0.99, 1.0) == pytest.approx(momentum, abs=5e-11)


@pytest.mark.parametrize(("epoch", "lr"), [(0, 0), (0.5, 0.48), (5, 4.8), (10, 9.6), (55, 4.8), (100, 0)])
def test_v3_resnet_rate(epoch: float, lr: float) -> None:
    assert warmup_then_cosine(epoch, 100, 10, 9.6) == pytest.approx(lr, abs=1e-12)


@pytest.mark.parametrize(("epoch", "lr"), [(20, 1.2e-3), (40, 2.4e-3), (170, 1.2e-3)])
def test_v3_vit_rate(epoch: float, lr: float) -> None:
    assert warmup_then_cosine(epoch, 300, 40, 2.4e-3) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(("epoch", "lr"), [(0, 0.03), (1, 0.0299981495), (100, 0.015), (199, 1.85051e-6)])
def test_v2_rate(epoch: float, lr: float) -> None:
    assert warmup_then_cosine(epoch, 200, 0, 0.03) == pytest.approx(lr, abs=5e-11)


@pytest.mark.parametrize(("epoch", "lr"), [(0, 0.03), (119, 0.03), (120, 0.003), (159, 0.003), (160, 0.0003)])
def test_v1_rate(epoch: float, lr: float) -> None:
    assert warmup_then_steps(epoch, [120, 160], 0.1, 0, 0.03) == pytest.approx(lr, rel=1e-12)


def test_per_epoch_holds_between_boundaries() -> None:
    positions = [step / 7 for step in range(21)]
    assert [per_epoch(position) for position in positions] == [0.0] * 7 + [1.0] * 7 + [2.0] * 7
    assert torch.tensor(positions).diff().min() > 0


@pytest.mark.parametrize(("epoch", "lr"), [(0, 0.3), (5, 2.55), (10, 4.8), (405, 2.4024), (800, 0.0048)])
def test_swav_rate_starts_and_ends_above_zero(epoch: float, lr: float) -> None:
    assert warmup_then_cosine(epoch, 800, 10, 4.8, start=0.3, final=0.0048) == pytest.approx(lr, rel=1e-12)


DRAWN = {
    "simclr, 2 layers": (lambda: simclr_head(512, 512, 128, num_layers=2), lambda _width: 0.01, None),
    "simclr, 3 layers": (lambda: simclr_head(512, 512, 128, num_layers=3), lambda _width: 0.01, None),
    # A normal cut at two deviations has 0.8796 of its standard deviation.
    "byol": (lambda: byol_mlp(512, 1024, 256), lambda width: 0.87962566 / math.sqrt(width), lambda w: 2 / math.sqrt(w)),
    "swav": (lambda: swav_head(512, 512, 128), lambda width: 1 / math.sqrt(3 * width), lambda w: 1 / math.sqrt(w)),
    "moco_v1": (lambda: nn.Linear(512, 128), lambda width: 1 / math.sqrt(3 * width), lambda w: 1 / math.sqrt(w)),
    "moco_v2": (lambda: mlp_head(512, 512, 128), lambda width: 1 / math.sqrt(3 * width), lambda w: 1 / math.sqrt(w)),
    "moco_v3": (
        lambda: batch_norm_mlp(512, 1024, 256, num_layers=3, last_norm=True),
        lambda width: 1 / math.sqrt(3 * width),
        lambda w: 1 / math.sqrt(w),
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_first_weights_are_drawn_as_the_official_code_draws_them(name: str) -> None:
    make, spread, bound = DRAWN[name]
    torch.manual_seed(0)
    for layer in make().modules():
        if not isinstance(layer, nn.Linear):
            continue
        assert layer.weight.std().item() == pytest.approx(spread(layer.in_features), rel=0.02)
        assert layer.weight.mean().item() == pytest.approx(0.0, abs=0.02 * spread(layer.in_features))
        largest = layer.weight.abs().max().item()
        if bound is None:  # a normal is not cut: of 65 536 draws the largest lies beyond 3.5 deviations
            assert largest > 3.5 * spread(layer.in_features)
        else:
            assert 0.99 * bound(layer.in_features) < largest <= bound(layer.in_features) * (1 + 1e-6)
        if layer.bias is not None:
            assert bool(layer.bias.any()) == (name != "byol")
