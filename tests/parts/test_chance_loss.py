"""Losses at chance against numbers that scipy's Bessel functions gave, and against random vectors."""

import math

import pytest
import torch
from conftest import small_recipe
from torch.nn.functional import cross_entropy, normalize

from sslkit.engine.setup import build_method
from sslkit.parts.chance_loss import ChanceLoss, info_nce_chance_loss, log_mean_exp


@pytest.mark.parametrize(
    ("dim", "temperature", "expected"),
    [(128, 0.07, 0.79238), (128, 0.2, 0.09758), (128, 0.1, 0.38946), (256, 0.2, 0.04882), (256, 1.0, 0.00195)],
)
def test_log_mean_exp(dim: int, temperature: float, expected: float) -> None:
    assert log_mean_exp(dim, temperature) == pytest.approx(expected, abs=5e-6)


def test_log_mean_exp_has_no_overflow() -> None:
    # On a circle E is the Bessel function I_0, about exp(x) / sqrt(2 pi x).
    assert log_mean_exp(2, 1e-3) == pytest.approx(1000 - 0.5 * math.log(2 * math.pi * 1000), abs=1e-3)
    assert log_mean_exp(65536, 1e-3) == pytest.approx(1e6 / (2 * 65536), rel=0.01)


@pytest.mark.parametrize(
    ("contrast", "expected"),
    [
        (info_nce_chance_loss(65536, 0.07, 128, scale=1), 11.88),
        (info_nce_chance_loss(65536, 0.2, 128, scale=1), 11.188),
        (info_nce_chance_loss(4096, 0.1, 128, scale=1), 8.707),
        (info_nce_chance_loss(4095, 1.0, 256, scale=4), 33.279),
        (info_nce_chance_loss(4095, 0.2, 256, scale=0.8), 6.693),
        (info_nce_chance_loss(510, 0.5, 128, scale=1), 6.25),
    ],
)
def test_levels_of_the_papers(contrast: ChanceLoss, expected: float) -> None:
    assert contrast.value == contrast.at_similarity(0.0) == pytest.approx(expected, abs=3e-3)


def test_level_and_tolerance_hold_on_random_vectors() -> None:
    torch.manual_seed(0)
    query, queue = (normalize(torch.randn(rows, 32, dtype=torch.float64), dim=1) for rows in (256, 2048))
    contrast = info_nce_chance_loss(2048, 0.15, 32)
    for similarity in (0.0, 1.0):
        positive = torch.full((256, 1), similarity, dtype=torch.float64)
        logits = torch.cat([positive, query @ queue.T], dim=1) / 0.15
        loss = float(cross_entropy(logits, torch.zeros(256, dtype=torch.long)))
        assert abs(loss - contrast.at_similarity(similarity)) < contrast.tolerance(256)
        assert abs(loss - math.log(2049)) > contrast.tolerance(256)


def test_a_regression_has_a_chance_loss_without_negatives() -> None:
    chance = build_method(small_recipe("byol", "test_resnet"), num_samples=20).chance_loss(8)
    assert chance is not None
    assert (chance.value, chance.formula) == (4.0, "2 - 2 cos in both directions")
    assert chance.negatives is None
