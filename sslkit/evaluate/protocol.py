"""What makes two scores comparable: the protocol's hash, and how far a score may be off by chance."""

import hashlib
import json
from typing import Any

import numpy as np

from sslkit.evaluate.labels import LabelledPair

RESAMPLES = 10_000


def protocol_hash(settings: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that are equal when every setting is, in whatever order it stands."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def data_settings(pair: LabelledPair) -> dict[str, Any]:
    """The data's part of a protocol: how many images of which classes in which order, wherever they lie."""
    digest = hashlib.sha256("\0".join(pair.classes).encode())
    for labels in (pair.train_labels, pair.test_labels):
        digest.update(labels.numpy().tobytes())
    return {"train_images": len(pair.train), "test_images": len(pair.test), "labels": digest.hexdigest()[:12]}


def bootstrap_interval(accuracy: float, count: int, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of `RESAMPLES` bootstrap accuracies of ``count`` test images.

    Images drawn with replacement from a set of which a share ``accuracy`` is right: their number of right ones is
    binomial, so that it is drawn directly.
    """
    right = np.random.default_rng(seed).binomial(count, accuracy, size=RESAMPLES)
    low, high = np.quantile(right / count, [0.025, 0.975])
    return float(low), float(high)
