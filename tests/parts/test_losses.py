"""Losses against golden numbers (sslkit's reference facts) and naive float64 transcriptions."""

import math

import pytest
import torch
from golden.formulas import chance_level, moco_logits_loss, moco_v3_loss
from torch import Tensor
from torch.nn.functional import normalize

from sslkit.parts.losses import info_nce_in_batch, info_nce_with_queue, unit_rows


def wave(function: str, scale: float, shift: float, rows: int = 8, columns: int = 16) -> Tensor:
    index = torch.arange(rows * columns, dtype=torch.float64).view(rows, columns)
    return getattr(torch, function)(scale * index + shift)


Q, K = wave("sin", 0.1, 0.3), wave("cos", 0.07, 0.1)
Q2, K2 = wave("sin", 0.13, 0.2), wave("cos", 0.05, 0.4)


def ctr(query: Tensor, keys: Tensor, temperature: float, first_label: int) -> tuple[Tensor, Tensor]:
    """MoCo v3's scale."""
    loss, accuracy = info_nce_in_batch(query, keys, temperature, first_label)
    return 2 * temperature * loss, accuracy


def v3_loss(q1: Tensor, k2: Tensor, q2: Tensor, k1: Tensor, temperature: float) -> Tensor:
    return ctr(q1, k2, temperature, first_label=0)[0] + ctr(q2, k1, temperature, first_label=0)[0]


@pytest.mark.parametrize(("temperature", "expected"), [(0.07, 2.741382635681802), (0.2, 2.0178494603864183)])
def test_queue_loss_has_the_golden_value(temperature: float, expected: float) -> None:
    queue = normalize(wave("sin", 0.37, 1.1, 16, 32), dim=0).T
    loss, accuracy = info_nce_with_queue(unit_rows(Q), unit_rows(K), queue, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert accuracy.item() == pytest.approx(0.625)
    naive, _ = moco_logits_loss(Q, K, queue.T, temperature)
    assert loss.item() == pytest.approx(naive.item(), rel=1e-12)


@pytest.mark.parametrize(("temperature", "expected"), [(0.2, 3.906991990131815), (1.0, 8.99951170251423)])
def test_in_batch_loss_has_the_golden_value(temperature: float, expected: float) -> None:
    assert v3_loss(Q, K2, Q2, K, temperature).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("temperature", "expected"), [(0.2, 0.20885607), (1.0, 0.19423188)])
def test_in_batch_gradient_has_the_golden_norm(temperature: float, expected: float) -> None:
    query = Q.clone().requires_grad_()
    v3_loss(query, K2, Q2, K, temperature).backward()
    assert query.grad is not None
    assert query.grad.norm().item() == pytest.approx(expected, abs=5e-9)


def test_labels_of_a_rank_start_at_its_offset() -> None:
    halves = [
        ctr(Q[start : start + 4], K2, 0.2, first_label=start)[0]
        + ctr(Q2[start : start + 4], K, 0.2, first_label=start)[0]
        for start in (0, 4)
    ]
    assert [half.item() for half in halves] == pytest.approx([1.8190445587, 5.9949394215], abs=1e-9)
    assert sum(half.item() for half in halves) / 2 == pytest.approx(3.906991990131815, rel=1e-12)
    aligned = ctr(Q[4:], Q, 0.2, first_label=4)[0]
    assert aligned < ctr(Q[4:], Q, 0.2, first_label=0)[0]


def test_views_may_be_swapped_in_v3() -> None:
    assert v3_loss(Q, K2, Q2, K, 0.2).item() == pytest.approx(v3_loss(Q2, K, Q, K2, 0.2).item(), rel=1e-14)


def test_joint_permutation_leaves_losses_alone_and_a_single_one_does_not() -> None:
    order = torch.tensor([3, 0, 1, 2, 7, 6, 4, 5])
    near = Q + 0.01 * K
    loss = ctr(Q, near, 0.2, 0)[0].item()
    assert ctr(Q[order], near[order], 0.2, 0)[0].item() == pytest.approx(loss, rel=1e-12)
    assert ctr(Q, near[order], 0.2, 0)[0].item() > loss
    queue = unit_rows(wave("sin", 0.37, 1.1, 32, 16))
    joint = info_nce_with_queue(unit_rows(Q)[order], unit_rows(near)[order], queue, 0.2)[0].item()
    assert joint == pytest.approx(info_nce_with_queue(unit_rows(Q), unit_rows(near), queue, 0.2)[0].item(), rel=1e-12)
    assert info_nce_with_queue(unit_rows(Q), unit_rows(near)[order], queue, 0.2)[0].item() > joint


def test_keys_and_queue_receive_no_gradient() -> None:
    query, key, queue = (unit_rows(x).requires_grad_() for x in (Q, K, wave("sin", 0.37, 1.1, 32, 16)))
    info_nce_with_queue(query, key, queue, 0.2)[0].backward()
    assert query.grad is not None
    assert key.grad is None
    assert queue.grad is None


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_chance_level_of_random_unit_vectors(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, queue = (unit_rows(torch.randn(rows, 128, generator=generator)) for rows in (1280, 1280, 4096))
    loss = info_nce_with_queue(query, key, queue, temperature)[0].item()
    standard_error = 1 / (temperature * math.sqrt(128 * 1280))
    assert abs(loss - chance_level(4096, 128, temperature)) < 4 * standard_error


def test_collapsed_encoder_has_the_exact_values() -> None:
    same = torch.ones(8, 16, dtype=torch.float64)
    loss = info_nce_with_queue(unit_rows(same), unit_rows(same), unit_rows(torch.ones(31, 16).double()), 0.07)[0]
    assert loss.item() == pytest.approx(math.log(32), rel=1e-9)
    assert v3_loss(same, same, same, same, 0.2).item() == pytest.approx(4 * 0.2 * math.log(8), rel=1e-12)


def test_halving_the_temperature_follows_two_tau_cross_entropy() -> None:
    for temperature in (0.4, 0.2):
        ours = v3_loss(Q, K2, Q2, K, temperature).item()
        assert ours == pytest.approx(moco_v3_loss(Q, K2, Q2, K, temperature).item(), rel=1e-12)


def test_half_precision_embeddings_are_compared_in_float32() -> None:
    half = [unit_rows(x.bfloat16()) for x in (Q, K)]
    assert half[0].dtype == torch.float32
    queue = unit_rows(wave("sin", 0.37, 1.1, 32, 16)).float()
    assert info_nce_with_queue(*half, queue, 0.07)[0].dtype == torch.float32
