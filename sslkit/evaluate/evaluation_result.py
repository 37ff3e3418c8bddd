"""The result of an evaluation: the scores of an encoder and of its baselines under one protocol."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sslkit.evaluate.protocol import protocol_hash
from sslkit.evaluate.verdict import QUANTILES, RESAMPLES, Difference, paired_difference, verdict

RANDOM_DRAWS = 3  # of random weights


@dataclass(frozen=True)
class Score:
    """The score of one encoder.

    Attributes:
        encoder: Name of the encoder.
        accuracy: Value of the result's `EvaluationResult.measure`, in [0, 1].
        interval: Bootstrap 95 % interval of the accuracy, if computed.
        note: Hyperparameters that were selected.
        measures: All measures by name, in [0, 1], if there is more than one.
        intervals: Bootstrap 95 % interval of each measure.
        encoder_revision: Commit on the Hugging Face Hub; empty for encoders from elsewhere.
        difference: Of a baseline: how much better the evaluated encoder is, in points, on the same images.
    """

    encoder: str
    accuracy: float
    interval: tuple[float, float] | None = None
    note: str = ""
    measures: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    encoder_revision: str = ""
    difference: Difference | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of an encoder and its baselines under one protocol.

    Attributes:
        evaluation: Name of the evaluation, such as ``knn k=20 temperature=0.07``.
        data: Description of the images.
        protocol: All settings that the scores depend on, except the encoder.
        scores: The encoder's score first, then the baselines'.
        measure: What ``accuracy`` of the scores measures.
        grid: For a sweep, every combination tried on the encoder, best first on the held-out images.
    """

    evaluation: str
    data: str
    protocol: dict[str, Any]
    scores: list[Score]
    measure: str = "top-1 accuracy"
    grid: list[dict[str, Any]] = field(default_factory=list)

    @property
    def protocol_hash(self) -> str:
        """Hash of the protocol; only scores with equal hashes are comparable."""
        return protocol_hash(self.protocol)

    @property
    def verdict(self) -> str:
        """One sentence: how the encoder stands against each baseline. Empty if there is none."""
        return verdict_of(self.scores)


def verdict_of(scores: Sequence[Score]) -> str:
    """One sentence: how the first encoder stands against each of the others. Empty if there are none."""
    names = {"from scratch": "training from scratch"}
    return verdict({names.get(each.encoder, each.encoder): each.difference for each in scores if each.difference})


def score_of(
    encoder: str, correct: ArrayLike, own: ArrayLike | None = None, *, note: str = "", revision: str = ""
) -> Score:
    """The score of an encoder from whether each test image is classified correctly, (N,) bool.

    For a baseline, ``own`` says the same of the evaluated encoder.
    """
    accuracy = float(np.asarray(correct, dtype=np.float32).mean())
    interval = bootstrap_interval(accuracy, len(np.asarray(correct)))
    difference = None if own is None else paired_difference(own, correct)
    return Score(encoder, accuracy, interval, note, encoder_revision=revision, difference=difference)


def score_of_draws(encoder: str, draws: Sequence[ArrayLike], own: ArrayLike, *, note: str = "") -> Score:
    """The score of random weights: the mean over some draws of them, each (N,) bool as for `score_of`.

    One draw may be 10 points above another. The intervals therefore reach from the lowest end to the highest of all
    draws, so that an encoder beats random weights only if it beats each draw.
    """
    scores = [score_of(encoder, correct, own, note=note) for correct in draws]
    differences = [each.difference for each in scores if each.difference is not None]
    intervals = [each.interval for each in scores if each.interval is not None]
    mean = Difference(
        float(np.mean([each.points for each in differences])),
        min(each.low for each in differences),
        max(each.high for each in differences),
        differences[0].images,
    )
    interval = min(low for low, _ in intervals), max(high for _, high in intervals)
    accuracy = float(np.mean([each.accuracy for each in scores]))
    note = f"mean of {len(draws)} draws" if len(draws) > 1 else note  # what was chosen may differ between draws
    return Score(encoder, accuracy, interval, note, difference=mean)


def bootstrap_interval(accuracy: float, count: int, seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of an accuracy on ``count`` images, from `RESAMPLES` resamples.

    The number of correct images in a resample is binomial, so it is drawn directly. Where all images are right, or
    none, all resamples are alike; the exact interval (Clopper and Pearson) is returned then.
    """
    if accuracy in (0.0, 1.0):
        other = float(QUANTILES[0] ** (1 / count))
        return (other, 1.0) if accuracy else (0.0, 1.0 - other)
    correct = np.random.default_rng(seed).binomial(count, accuracy, size=RESAMPLES)
    low, high = np.quantile(correct / count, QUANTILES)
    return float(low), float(high)
