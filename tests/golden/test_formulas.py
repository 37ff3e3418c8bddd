"""Checks the formula oracles against the golden numbers of section 10 of the facts document.

Golden losses are quoted with about 16 digits, gradient norms with 8 decimals, LARS values and schedules with
10. Each tolerance is half a unit of the last quoted digit (1e-12 for the full-precision ones) unless said
otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from . import formulas as fm
from .arithmetic import (
    head_linear_std,
    head_parameter_counts,
    resnet50_trunk_count,
    vit_init_bounds,
    vit_trunk_count,
    xavier_bound,
)

N, D = 8, 16


def wave(f: Callable[[Tensor], Tensor], rows: int, cols: int, a: float, b: float) -> Tensor:
    """Builds the structured matrix f(a * (i * cols + j) + b) of the facts document."""
    return f(a * torch.arange(rows * cols, dtype=torch.float64) + b).reshape(rows, cols)


Q = wave(torch.sin, N, D, 0.1, 0.3)
K = wave(torch.cos, N, D, 0.07, 0.1)
Q2 = wave(torch.sin, N, D, 0.13, 0.2)
K2 = wave(torch.cos, N, D, 0.05, 0.4)
QUEUE = fm.l2_rows(wave(torch.sin, D, 32, 0.37, 1.1).T).T


@pytest.mark.parametrize(("t", "expected"), [(0.07, 2.741382635681802), (0.2, 2.0178494603864183)])
def test_v1_v2_loss(t: float, expected: float) -> None:
    """The queue loss, its accuracy, and torch's own cross-entropy agree."""
    loss, logits = fm.moco_logits_loss(Q, K, QUEUE, t)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert logits.shape == (N, 33)
    assert (logits.argmax(dim=1) == 0).double().mean().item() == 0.625
    labels = torch.zeros(N, dtype=torch.long)
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-12)


def test_v1_v2_first_logit() -> None:
    """The positive logit of the first sample at T = .07."""
    assert fm.moco_logits_loss(Q, K, QUEUE, 0.07)[1][0, 0].item() == pytest.approx(12.5058475097, abs=5e-11)


@pytest.mark.parametrize(
    ("t", "one_way", "both", "grad_norm"),
    [
        (0.2, 2.108565653487252, 3.906991990131815, 0.20885607),
        (1.0, 4.651294089274806, 8.99951170251423, 0.19423188),
    ],
)
def test_v3_loss(t: float, one_way: float, both: float, grad_norm: float) -> None:
    """One direction, both directions, and the gradient norm with respect to Q; keys get no gradient."""
    q, k2 = Q.clone().requires_grad_(), K2.clone().requires_grad_()
    assert fm.moco_v3_ctr(q, k2, t).item() == pytest.approx(one_way, abs=1e-12)
    loss = fm.moco_v3_loss(q, k2, Q2, K, t)
    assert loss.item() == pytest.approx(both, abs=1e-12)
    torch.autograd.backward(loss)
    assert q.grad is not None
    assert q.grad.norm().item() == pytest.approx(grad_norm, abs=5e-9)
    assert k2.grad is None


def test_v3_two_ranks() -> None:
    """Local losses of two ranks, their mean and the averaged gradients against one process."""
    q, q2 = Q.clone().requires_grad_(), Q2.clone().requires_grad_()
    halves = (slice(0, 4), slice(4, 8))
    local = [fm.moco_v3_loss(q[h], K2, q2[h], K, 0.2, rank, 2) for rank, h in enumerate(halves)]
    assert [x.item() for x in local] == pytest.approx([1.8190445587, 5.9949394215], abs=5e-11)
    mean = torch.stack(local).mean()
    whole = fm.moco_v3_loss(q, K2, q2, K, 0.2)
    assert mean.item() == pytest.approx(whole.item(), abs=1e-12)
    for a, b in zip(torch.autograd.grad(mean, (q, q2)), torch.autograd.grad(whole, (q, q2)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_v3_wrong_world_size_raises() -> None:
    """Keys that do not fit the ranks are refused."""
    with pytest.raises(ValueError, match="do not fit"):
        fm.moco_v3_ctr(Q, K2, 0.2, rank=0, world_size=2)


def test_v3_wrong_rank_raises_the_loss() -> None:
    """On aligned features the right label offset gives the smaller loss."""
    aligned = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    right = fm.moco_v3_ctr(aligned[4:], aligned, 0.2, rank=1, world_size=2)
    assert right < fm.moco_v3_ctr(aligned[4:], aligned, 0.2, rank=0, world_size=2)


@pytest.mark.parametrize("t", [0.07, 0.2, 1.0])
def test_collapsed_losses(t: float) -> None:
    """Equal vectors everywhere give ln(K + 1) for the queue and 4 T ln N for v3, exactly."""
    one = Q[:1].expand(N, D)
    same_queue = fm.l2_rows(Q[:1]).T.expand(D, 32)
    assert fm.moco_logits_loss(one, one, same_queue, t)[0].item() == pytest.approx(math.log(33), abs=1e-12)
    assert fm.moco_v3_loss(one, one, one, one, t).item() == pytest.approx(4 * t * math.log(N), abs=1e-12)


def test_lars() -> None:
    """Two LARS steps on a matrix and a vector.

    All quoted elements agree to 10 decimals but the quoted sum, .1109245765, is 4e-10 away from the computed
    .11092457689, so the sum is held to 5e-10.
    """
    p = wave(torch.sin, 3, 4, 0.5, 0.2)
    b = wave(torch.cos, 3, 4, 0.5, 0.2)[0]
    grads = [(wave(torch.cos, 3, 4, 0.3, 0.1 * t), wave(torch.sin, 3, 4, 0.3, 0.1 * t)[0]) for t in (1, 2)]
    new_p, new_b = fm.lars_steps([p, b], grads, lr=0.6, wd=1e-2, momentum=0.9, eta=1e-3)
    first_row = [0.1970112284, 0.6426922555, 0.9307842620, 0.9907951069]
    assert new_p[0].tolist() == pytest.approx(first_row, abs=5e-11)
    assert new_p.sum().item() == pytest.approx(0.1109245765, abs=5e-10)
    assert new_b.tolist() == pytest.approx([0.7470548844, 0.0332499539, -0.8024640635, -1.6228458330], abs=5e-11)


def test_lars_first_step_norm() -> None:
    """The first step of a matrix has length lr * eta * norm, up to rounding."""
    p = wave(torch.sin, 3, 4, 0.5, 0.2)
    (new,) = fm.lars_steps([p], [[wave(torch.cos, 3, 4, 0.3, 0.1)]], lr=0.6, wd=1e-2, momentum=0.9, eta=1e-3)
    assert (new - p).norm().item() == pytest.approx(0.6e-3 * p.norm().item(), rel=1e-10)


@pytest.mark.parametrize(
    ("e", "expected"),
    [
        (0, 0.99),
        (1, 0.9900024672),
        (25, 0.9914644661),
        (50, 0.995),
        (75, 0.9985355339),
        (99, 0.9999975328),
        (100, 1.0),
    ],
)
def test_momentum_schedule(e: int, expected: float) -> None:
    """Teacher momentum from .99 over 100 epochs."""
    assert fm.cosine_momentum(e, 100, 0.99) == pytest.approx(expected, abs=5.1e-11)


@pytest.mark.parametrize(
    ("e", "warmup", "epochs", "peak", "expected"),
    [
        (0, 10, 100, 9.6, 0.0),
        (0.5, 10, 100, 9.6, 0.48),
        (5, 10, 100, 9.6, 4.8),
        (10, 10, 100, 9.6, 9.6),
        (55, 10, 100, 9.6, 4.8),
        (100, 10, 100, 9.6, 0.0),
        (20, 40, 300, 2.4e-3, 1.2e-3),
        (40, 40, 300, 2.4e-3, 2.4e-3),
        (170, 40, 300, 2.4e-3, 1.2e-3),
    ],
)
def test_v3_lr_schedule(e: float, warmup: int, epochs: int, peak: float, expected: float) -> None:
    """Warmup and cosine at fractional epochs."""
    assert fm.warmup_cosine_lr(e, warmup, epochs, peak) == pytest.approx(expected, abs=1e-12)


def test_v1_v2_lr_schedules() -> None:
    """Per-epoch cosine of v2 over 200 epochs and step decay of v1."""
    assert fm.cosine_epoch_lr(1, 200, 0.03) == pytest.approx(0.0299981495, abs=5e-11)
    assert fm.cosine_epoch_lr(100, 200, 0.03) == pytest.approx(0.015, abs=1e-12)
    assert fm.cosine_epoch_lr(199, 200, 0.03) == pytest.approx(1.85051e-6, abs=5e-12)
    steps = [fm.step_decay_lr(epoch, 0.03) for epoch in (0, 119, 120, 159, 160, 199)]
    assert steps == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003], rel=1e-12)


@pytest.mark.parametrize(
    ("d", "t", "expected"),
    [
        (128, 0.07, 0.79238),
        (128, 0.2, 0.09758),
        (128, 0.1, 0.38946),
        (256, 0.2, 0.04882),
        (256, 1.0, 0.00195),
    ],
)
def test_log_mean_exp(d: int, t: float, expected: float) -> None:
    """The Bessel expression; quoted with five decimals."""
    assert fm.log_mean_exp_similarity(d, t) == pytest.approx(expected, abs=5.1e-6)


def test_chance_levels() -> None:
    """Quoted chance levels; three decimals at most, two for the first."""
    assert fm.chance_level(65536, 128, 0.07) == pytest.approx(11.88, abs=5e-3)
    assert fm.chance_level(65536, 128, 0.2) == pytest.approx(11.188, abs=5e-4)
    assert fm.chance_level(4096, 128, 0.1) == pytest.approx(8.707, abs=5e-4)
    assert 4.0 * fm.chance_level(4096, 256, 1.0) == pytest.approx(33.279, abs=5e-4)
    assert 0.8 * fm.chance_level(4096, 256, 0.2) == pytest.approx(6.693, abs=5e-4)


@pytest.mark.parametrize(("t", "quoted"), [(0.07, 0.087), (0.2, 6.19)])
def test_aligned_step_zero(t: float, quoted: float) -> None:
    """Positives at cosine one against a random queue: ln(1 + exp(chance - 1 / T))."""
    level = math.log1p(math.exp(fm.chance_level(65536, 128, t) - 1 / t))
    assert level == pytest.approx(quoted, abs=5e-3 if t == 0.2 else 5e-4)


@pytest.mark.parametrize("t", [0.07, 0.2])
def test_chance_level_measured(t: float) -> None:
    """Random unit vectors reach the chance level, within 4 standard errors 1 / (T sqrt(d n)) of the positive.

    The average over the negatives alone has no such noise and is held to .01 (a few of its standard errors).
    """
    d, n, k = 128, 512, 65536
    gen = torch.Generator().manual_seed(3)
    draw = [torch.nn.functional.normalize(torch.randn(size, d, generator=gen)) for size in (n, n, k)]
    queries, keys, queue = draw
    positive = (queries * keys).sum(dim=1, keepdim=True) / t
    negatives = queries @ queue.T / t
    loss = (torch.logsumexp(torch.cat([positive, negatives], dim=1), dim=1) - positive[:, 0]).mean().item()
    assert loss == pytest.approx(fm.chance_level(k, d, t), abs=4 / (t * math.sqrt(d * n)))
    only_negatives = torch.logsumexp(negatives, dim=1).mean().item()
    assert only_negatives == pytest.approx(fm.chance_level(k, d, t), abs=0.01)
    assert abs(loss - math.log(k + 1)) > (0.5 if t == 0.07 else 0.0)


@pytest.mark.parametrize(("dim", "total"), [(384, 34713.824), (768, 69594.494)])
def test_sincos_sums(dim: int, total: float) -> None:
    """Sums of the 14 x 14 table, zero class row, squared row norms of half the width."""
    table = fm.sincos2d(14, 14, dim, class_row=True)
    assert table.shape == (197, dim)
    assert table[0].abs().max().item() == 0.0
    assert table.sum().item() == pytest.approx(total, abs=5e-4)
    assert table[1:].square().sum(dim=1).tolist() == pytest.approx([dim / 2] * 196, abs=1e-10)


def test_sincos_small() -> None:
    """The 2 x 2 table of width 8, quoted with four to five decimals."""
    off, on = [0.0, 0.0, 1.0, 1.0], [0.8415, 0.0100, 0.5403, 0.99995]
    expected = torch.tensor([off + off, off + on, on + off, on + on], dtype=torch.float64)
    torch.testing.assert_close(fm.sincos2d(2, 2, 8), expected, rtol=0, atol=5e-5)


def test_parameter_counts() -> None:
    """Every count of section 0."""
    assert head_parameter_counts() == {
        "v1": 262_272,
        "v2": 4_458_624,
        "v3_r50_projector": 9_445_376,
        "v3_vit_s_projector": 19_415_040,
        "v3_vit_b_projector": 20_987_904,
        "v3_r50_predictor": 2_105_344,
        "v3_vit_predictor": 2_105_344,
        "byol_projector": 9_449_472,
        "byol_predictor": 2_109_440,
        "swav": 4_846_720,
    }
    assert resnet50_trunk_count() == 23_508_032
    assert (vit_trunk_count(384), vit_trunk_count(768)) == (21_665_664, 85_798_656)
    assert (vit_trunk_count(384, True), vit_trunk_count(768, True)) == (21_294_720, 85_056_768)


def test_init_bounds() -> None:
    """Quoted ViT bounds and the head standard deviation at fan-in 512."""
    small, base = vit_init_bounds(384), vit_init_bounds(768)
    assert (small["qkv"], small["patch_embed"]) == pytest.approx((0.0883883, 0.0721688), abs=5e-8)
    assert (base["qkv"], base["patch_embed"]) == pytest.approx((0.0625, 0.0625), abs=1e-12)
    assert small["qkv"] == pytest.approx(math.sqrt(6 / (3 * 384 / 3 + 384)), abs=1e-15)
    assert small["fc1"] == small["fc2"] == xavier_bound(384, 1536)
    assert head_linear_std(512) == pytest.approx(0.02552, abs=5e-6)
