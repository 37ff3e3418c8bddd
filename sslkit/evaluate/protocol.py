"""The settings that a score depends on, and their hash: scores with equal hashes are comparable."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from sslkit.data.sources.image_identity import images_digest
from sslkit.data.tools.inspection import count_alpha
from sslkit.evaluate.labelled_data import LabelledPair

PREPROCESSING_KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def protocol_hash(settings: dict[str, Any]) -> str:
    """First 12 hexadecimal digits of a SHA-256 of the settings. The order of the keys does not matter."""
    return digest_of(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode())


def digest_of(*parts: "bytes | np.ndarray[Any, Any]") -> str:
    """First 12 hexadecimal digits of a SHA-256 of bytes and arrays."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.tobytes())
    return digest.hexdigest()[:12]


def data_settings(pair: LabelledPair) -> dict[str, Any]:
    """The settings of the data: images, split and labels. File locations are not included."""
    # Recorded only for images with an alpha channel, so that other hashes stay equal to those of older versions.
    alpha = any(count_alpha(source)[0] for source in (pair.train, pair.test))
    return ({"background": pair.train.background} if alpha else {}) | {
        "split": pair.split,
        "train_images": len(pair.train),
        "test_images": len(pair.test),
        "train_digest": images_digest(pair.train),
        "test_digest": images_digest(pair.test),
        "labels": digest_of("\0".join(pair.classes).encode(), pair.train_labels.numpy(), pair.test_labels.numpy()),
    }


def preprocessing_settings(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of crop and normalisation from a complete data config of timm."""
    settings = {name: preprocessing.get(name, "center" if name == "crop_mode" else None) for name in PREPROCESSING_KEYS}
    return {name: list(value) if isinstance(value, list | tuple) else value for name, value in settings.items()}
