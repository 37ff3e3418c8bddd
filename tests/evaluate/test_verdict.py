"""Paired differences against formulas for 2 x 2 tables, exact tests and simulated pairs."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sslkit.evaluate.evaluation_result import score_of, score_of_draws
from sslkit.evaluate.verdict import Difference, paired_difference, verdict

# images that only the first, only the second, and both or none classify correctly
TABLES = [(30, 12, 158), (12, 30, 158), (9, 9, 32), (0, 0, 50), (40, 0, 160), (151, 90, 759), (1, 0, 1999)]


def pairs(first: int, second: int, equal: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Correctness of two encoders on shuffled images with these counts."""
    order = np.random.default_rng(3).permutation(first + second + equal)
    hit = np.arange(equal) % 3 > 0
    a = np.concatenate([np.ones(first, bool), np.zeros(second, bool), hit])[order]
    b = np.concatenate([np.zeros(first, bool), np.ones(second, bool), hit])[order]
    return a, b


def exact_p(first: int, second: int) -> float:
    """Two-sided p value of McNemar's exact test, by the mid-p rule (Fagerland et al., 2013)."""
    count, most = first + second, max(first, second)
    probabilities = [math.comb(count, hits) * 0.5**count for hits in range(most, count + 1)]
    return 2 * (sum(probabilities) - probabilities[0] / 2)


@pytest.mark.parametrize(("first", "second", "equal"), TABLES)
def test_interval_is_that_of_agresti_and_min(first: int, second: int, equal: int) -> None:
    found = paired_difference(*pairs(first, second, equal))
    assert found.points == pytest.approx(100 * (first - second) / (first + second + equal))
    size = first + second + equal + 2
    share = (first - second) / size
    deviation = math.sqrt(((first + second + 1) / size - share**2) / size)
    # The bootstrap's ends are multiples of 1 / size and follow the skewness; the formula's do neither.
    tolerance = 100 * (0.2 * deviation + 1 / size)
    assert found.low == pytest.approx(100 * (share - 1.96 * deviation), abs=tolerance)
    assert found.high == pytest.approx(100 * (share + 1.96 * deviation), abs=tolerance)
    assert found.images == size - 2


@pytest.mark.parametrize("equal", [20, 45, 950])
def test_a_difference_is_seen_where_the_exact_test_sees_one(equal: int) -> None:
    for first in range(13):
        for second in range(13):
            found, p = paired_difference(*pairs(first, second, equal)), exact_p(first, second)
            if p < 0.025 or p > 0.075:  # near 0.05 either is right
                assert (found.is_better or found.is_worse) == (p < 0.05), (first, second, p, str(found))
            assert found.is_better <= (first > second)
            assert found.is_worse <= (second > first)


@pytest.mark.parametrize(("images", "first", "second"), [(50, 0.1, 0.1), (200, 0.2, 0.1), (1000, 0.05, 0.02)])
def test_coverage_of_simulated_pairs(images: int, first: float, second: float) -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        counts = rng.multinomial(images, [first, second, 1 - first - second])
        found = paired_difference(*pairs(*counts.tolist()))
        covered += found.low <= 100 * (first - second) <= found.high
    assert 0.92 <= covered / 200 <= 0.98  # 95 %, with two standard errors of 200 draws


def test_scores_between_0_and_1_have_the_interval_of_their_mean() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.beta(4, 2, size=1500), rng.beta(2, 2, size=1500)
    found = paired_difference(a, b)
    mean, deviation = 100 * float((a - b).mean()), 100 * float((a - b).std()) / 1500**0.5
    assert found.points == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 1.96 * deviation, abs=0.15 * deviation)
    assert found.high == pytest.approx(mean + 1.96 * deviation, abs=0.15 * deviation)


def test_images_are_paired() -> None:
    """Two encoders that err on the same images: a difference far smaller than the error of each score is seen."""
    hard = np.random.default_rng(1).random(1000) < 0.5
    better = ~hard
    better[np.flatnonzero(hard)[:12]] = True
    assert paired_difference(better, ~hard).is_better
    assert not paired_difference(better, np.random.default_rng(2).permutation(~hard)).is_better


def test_same_arguments_give_the_same_interval_and_the_images_order_does_not_matter() -> None:
    a, b = pairs(30, 12, 158)
    assert paired_difference(a, b) == paired_difference(torch.from_numpy(a), torch.from_numpy(b).float())
    order = np.random.default_rng(0).permutation(len(a))
    assert paired_difference(a, b) == paired_difference(a[order], b[order])
    assert paired_difference(a, b) != paired_difference(a, b, seed=1)


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ((2.1, 0.9, 3.3), "better by 2.1 points (0.9 to 3.3)"),
        ((-2.1, -3.3, -0.9), "worse by 2.1 points (0.9 to 3.3)"),
        ((0.2, -0.8, 1.1), "no difference seen (-0.8 to 1.1)"),
        ((0.0, -0.04, 0.0), "no difference seen (0.0 to 0.0)"),
        ((0.12, 0.03, 0.2), "better by 0.12 points (0.03 to 0.20)"),
    ],
)
def test_sentence(numbers: tuple[float, float, float], sentence: str) -> None:
    assert str(Difference(*numbers, 1000)) == sentence


BETTER, WORSE, SAME = (Difference(*ends, 1000) for ends in ((2.1, 0.9, 3.3), (-4.0, -5.5, -2.5), (0.2, -0.8, 1.1)))


@pytest.mark.parametrize(
    ("differences", "sentence"),
    [
        ({}, ""),
        ({"raw pixels": BETTER}, "On 1000 test images, the encoder beats raw pixels by 2.1 points (0.9 to 3.3)"),
        (
            {"random init": BETTER, "raw pixels": BETTER},
            "On 1000 test images, the encoder beats every baseline: random init by 2.1 points (0.9 to 3.3) and raw "
            "pixels by 2.1 points (0.9 to 3.3)",
        ),
        (
            {"random init": BETTER, "raw pixels": WORSE, "colour histograms": SAME},
            "On 1000 test images, the encoder does not beat raw pixels: worse by 4.0 points (2.5 to 5.5), nor colour "
            "histograms: no difference seen (-0.8 to 1.1); it beats random init by 2.1 points (0.9 to 3.3)",
        ),
    ],
)
def test_verdict_names_first_what_is_not_beaten(differences: dict[str, Difference], sentence: str) -> None:
    assert verdict(differences) == sentence


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 0], [1], "one length"),
        ([], [], "one length"),
        ([[1, 0]], [[1, 0]], "one length"),
        ([0.5, 1.5], [0, 1], r"in \[0, 1\]"),
        ([0.5, float("nan")], [0, 1], r"in \[0, 1\]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(a: list[float], b: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b)


def test_random_weights_are_beaten_only_if_each_draw_is() -> None:
    """One lucky draw of random weights makes the interval reach it; the score is the mean of the draws."""
    own = np.arange(400) % 10 < 6
    draws = [np.arange(400) % 10 < 2, np.arange(400) % 10 < 4, np.arange(400) % 20 < 12]
    score = score_of_draws("random init", draws, own)
    single = [score_of("random init", each, own) for each in draws]
    assert score.accuracy == pytest.approx((0.2 + 0.4 + 0.6) / 3, abs=1e-6)
    assert score.difference is not None
    assert score.difference.points == pytest.approx(20.0)
    assert score.difference.low == min(each.difference.low for each in single if each.difference) <= 0.0
    assert score.difference.high == max(each.difference.high for each in single if each.difference)
    assert not score.difference.is_better
    assert score.note == "mean of 3 draws"
    without_luck = score_of_draws("random init", draws[:2], own)
    assert without_luck.difference is not None
    assert without_luck.difference.is_better
