"""What makes two scores comparable: the protocol's hash, and how far a score may be off by chance."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from sslkit.data.tools.inspection import count_alpha
from sslkit.evaluate.detection.annotations import AnnotatedPair
from sslkit.evaluate.features.image_identity import images_digest, pictures_digest
from sslkit.evaluate.labelled_data import LabelledPair
from sslkit.evaluate.probes.knn import KnnProtocol

RESAMPLES = 10_000
PREPROCESSING = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def protocol_hash(settings: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that are equal when every setting is, in whatever order it stands."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def data_settings(pair: LabelledPair) -> dict[str, Any]:
    """The data's part of a protocol: which images, split how, with which labels, wherever they lie."""
    # Only where it shows, so that scores of images without alpha stay comparable with earlier ones.
    alpha = any(count_alpha(source)[0] for source in (pair.train, pair.test))
    return ({"background": pair.train.background} if alpha else {}) | {
        "split": pair.split,
        "train_images": len(pair.train),
        "test_images": len(pair.test),
        "train_digest": images_digest(pair.train),
        "test_digest": images_digest(pair.test),
        "labels": digest_of("\0".join(pair.classes).encode(), pair.train_labels.numpy(), pair.test_labels.numpy()),
    }


def pictures_settings(pair: AnnotatedPair) -> dict[str, Any]:
    """The data's part of a protocol of detection."""
    return {
        "split": pair.split,
        "train_images": len(pair.train),
        "test_images": len(pair.test),
        "train_digest": pictures_digest(pair.train),
        "test_digest": pictures_digest(pair.test),
        "labels": digest_of("\0".join(pair.classes).encode()),
    }


def preprocessing_settings(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """The crop's and the normalisation's part of a protocol, as an encoder really has them.

    Args:
        preprocessing: timm's data config, complete.
    """
    settings = {name: preprocessing.get(name, "center" if name == "crop_mode" else None) for name in PREPROCESSING}
    return {name: list(value) if isinstance(value, list | tuple) else value for name, value in settings.items()}


def knn_settings(protocol: KnnProtocol, *others: Mapping[str, Any]) -> dict[str, Any]:
    """A kNN protocol with everything else that its score depends on."""
    settings: dict[str, Any] = {"kind": "knn", "metric": "cosine", "selection": "none", **vars(protocol)}
    for each in others:
        settings |= each
    return settings


def digest_of(*parts: "bytes | np.ndarray[Any, Any]") -> str:
    """Twelve hexadecimal digits of bytes and arrays."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.tobytes())
    return digest.hexdigest()[:12]


def bootstrap_interval(accuracy: float, count: int, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of `RESAMPLES` bootstrap accuracies of ``count`` test images.

    Images drawn with replacement from a set of which a share ``accuracy`` is right: their number of right ones is
    binomial, so that it is drawn directly.
    """
    right = np.random.default_rng(seed).binomial(count, accuracy, size=RESAMPLES)
    low, high = np.quantile(right / count, [0.025, 0.975])
    return float(low), float(high)
