"""The result of an evaluation: the scores of an encoder and of its baselines under one protocol."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sslkit.evaluate.protocol import protocol_hash

RESAMPLES = 10_000


@dataclass(frozen=True)
class Score:
    """The score of one encoder. Intervals are bootstrap 95 % intervals."""

    encoder: str  # its name
    accuracy: float  # value of the result's `EvaluationResult.measure`, in [0, 1]
    interval: tuple[float, float] | None = None  # of the accuracy, if computed
    note: str = ""  # hyperparameters that were selected
    measures: dict[str, float] = field(default_factory=dict)  # all by name, in [0, 1], if there is more than one
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # of each measure
    encoder_revision: str = ""  # commit on the Hugging Face Hub; empty for encoders from elsewhere


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of an encoder and its baselines under one protocol."""

    evaluation: str  # its name, such as ``knn k=20 temperature=0.07``
    data: str  # description of the images
    protocol: dict[str, Any]  # all settings that the scores depend on, except the encoder
    scores: list[Score]  # the encoder's first, then the baselines'
    measure: str = "top-1 accuracy"  # what ``accuracy`` of the scores measures
    grid: list[dict[str, Any]] = field(default_factory=list)  # of a sweep: all heads, best first on held-out images

    @property
    def protocol_hash(self) -> str:
        """Hash of the protocol; only scores with equal hashes are comparable."""
        return protocol_hash(self.protocol)


def bootstrap_interval(accuracy: float, count: int, seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of an accuracy on ``count`` images, from `RESAMPLES` resamples.

    The number of correct images in a resample is binomial, so it is drawn directly.
    """
    correct = np.random.default_rng(seed).binomial(count, accuracy, size=RESAMPLES)
    low, high = np.quantile(correct / count, [0.025, 0.975])
    return float(low), float(high)
