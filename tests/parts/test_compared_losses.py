"""Losses of the methods MoCo is compared with: golden numbers, invariants, and half precision."""

import math

import pytest
import torch
from golden.swav import sinkhorn
from test_losses import K2, Q2, K, Q, wave
from torch import Tensor
from torch.nn.functional import normalize

from sslkit.parts.losses import (
    inner_products,
    nce_against_noise,
    nt_xent,
    regression_loss,
    sinkhorn_codes,
    swapped_prediction,
    unit_rows,
)

PROTOTYPES = normalize(wave("cos", 0.29, 0.7, 10, 16), dim=1)


def simclr(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    return nt_xent(first, second, first, second, temperature, first_label=0)[0]


@pytest.mark.parametrize(("temperature", "expected"), [(0.1, 11.32965201986293), (0.5, 5.0970153752390654)])
def test_nt_xent_has_the_golden_value(temperature: float, expected: float) -> None:
    assert simclr(Q, K, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_nt_xent_of_ranks_adds_up_to_the_whole() -> None:
    halves = [
        nt_xent(Q[start : start + 4], K[start : start + 4], Q, K, 0.1, first_label=start)[0].item() for start in (0, 4)
    ]
    assert sum(halves) / 2 == pytest.approx(11.32965201986293, rel=1e-12)
    wrong = nt_xent(Q[4:], Q[4:] + 0.01 * K[4:], Q, Q + 0.01 * K, 0.1, first_label=0)[0]
    assert wrong > nt_xent(Q[4:], Q[4:] + 0.01 * K[4:], Q, Q + 0.01 * K, 0.1, first_label=4)[0]


def test_nt_xent_of_a_collapsed_encoder_and_its_twins() -> None:
    same = torch.ones(8, 16, dtype=torch.float64)
    assert simclr(same, same, 0.1).item() == pytest.approx(2 * math.log(15), rel=1e-12)
    loss, accuracy = nt_xent(Q, Q, Q, Q, 0.05, first_label=0)
    assert accuracy.item() == 1.0
    assert loss.item() > 0


def test_byol_has_the_golden_value_and_its_range() -> None:
    assert (regression_loss(Q, K2) + regression_loss(Q2, K)).item() == pytest.approx(3.6092829806746174, rel=1e-12)
    assert regression_loss(Q, 3.0 * Q).item() == pytest.approx(0.0, abs=1e-12)
    assert regression_loss(Q, -Q).item() == pytest.approx(4.0, rel=1e-12)
    target = K.clone().requires_grad_()
    regression_loss(Q.clone().requires_grad_(), target).backward()
    assert target.grad is None


def test_swav_has_the_golden_value() -> None:
    scores = [inner_products(unit_rows(rows), PROTOTYPES) for rows in (Q, K)]
    codes = [sinkhorn_codes(each, 0.05, 3) for each in scores]
    assert swapped_prediction(codes, scores, 0.1).item() == pytest.approx(4.445165042026105, rel=1e-12)
    assert codes[0][0, 2].item() == pytest.approx(0.4588927609604826, rel=1e-12)
    torch.testing.assert_close(codes[0].sum(dim=1), torch.ones(8, dtype=torch.float64))


def test_codes_spread_over_prototypes_and_ignore_a_constant() -> None:
    scores = torch.randn(512, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = [(sinkhorn_codes(scores, 0.05, n).sum(dim=0) / 5.12 - 1).abs().max().item() for n in (3, 300)]
    assert error[1] < 1e-6 < error[0]
    codes = sinkhorn_codes(scores, 0.05, 3)
    torch.testing.assert_close(codes, sinkhorn_codes(scores + 7.0, 0.05, 3))
    torch.testing.assert_close(codes, sinkhorn(scores, 0.05, 3))
    assert codes.min() >= 0


def test_half_precision_scores_do_not_overflow() -> None:
    """exp(40 / 0.05) is beyond any float; SwAV's code took it in the scores' own precision."""
    codes = sinkhorn_codes(torch.full((4, 3), 40.0, dtype=torch.float16), 0.05, 3)
    assert codes.dtype == torch.float32
    torch.testing.assert_close(codes, torch.full((4, 3), 1 / 3))


def test_uniform_scores_give_the_logarithm_of_the_prototypes() -> None:
    scores = [torch.zeros(6, 3000) for _ in range(4)]
    codes = [sinkhorn_codes(scores[0], 0.05, 3)] * 2
    assert swapped_prediction(codes, scores, 0.1).item() == pytest.approx(math.log(3000), rel=1e-5)


def test_nce_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negatives = torch.rand(3, generator=generator), torch.rand(3, 5, generator=generator)
    samples, eps, total = 40, 1e-7, 0.0
    for row in range(3):
        noise = 5 / samples
        total -= math.log(positive[row] / (positive[row] + noise + eps))
        for drawn in negatives[row]:
            total -= math.log(noise / (drawn + noise + eps))
    assert nce_against_noise(positive, negatives, 1 / samples).item() == pytest.approx(total / 3, rel=1e-5)
