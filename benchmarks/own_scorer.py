"""A scorer that shares no code with `sslkit eval`: timm's features, numpy's neighbours, scikit-learn's probe.

Features are those of the exported encoder as timm loads it. Images are resized to the encoder's input size by Pillow.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from small_sets import SmallSet
from torch import nn

Floats = NDArray[np.float64]
MAX_PROBE = 4000  # training images of the logistic regression
TEMPERATURE = 0.07  # of the votes of 20 neighbours


def load_encoder(folder: Path) -> nn.Module:
    """An exported encoder, as timm loads it."""
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    return model.eval()


def score(model: nn.Module, images: SmallSet) -> dict[str, float]:
    """Accuracy in percent: kNN by cosine of mean-subtracted features, and logistic regression.

    ``knn5``: the most frequent class of 5 neighbours; ``knn20_majority``: of 20; ``knn20``: 20 neighbours, each with
    the weight exp(cosine / 0.07).
    """
    config: Any = model.pretrained_cfg
    size, mean, std = config["input_size"][-1], config["mean"], config["std"]
    return score_features(*(_features(model, part, size, mean, std) for part in (images.train, images.test)), images)


def pixels(images: SmallSet, size: int) -> dict[str, float]:
    """The same scores of the pixels of images of this size."""
    parts = [
        None if part is None else _resized(part[0], size).reshape(len(part[0]), -1) / 255.0
        for part in (images.train, images.test)
    ]
    return score_features(parts[0], parts[1], images)


def colours(images: SmallSet, bins: int = 8) -> dict[str, float]:
    """The same scores of the square root of a histogram of colours."""
    parts = []
    for part in (images.train, images.test):
        if part is None:
            parts.append(None)
            continue
        codes = (part[0].astype(np.int64) * bins // 256) @ np.array([bins * bins, bins, 1])
        counts = [np.bincount(each.ravel(), minlength=bins**3) for each in codes]
        parts.append(np.sqrt(np.stack(counts) / codes[0].size))
    return score_features(parts[0], parts[1], images)


def score_features(train: Floats | None, test: Floats | None, images: SmallSet) -> dict[str, float]:
    """Score features (N, D) of the training images and (M, D) of the test images; without these, leave one out."""
    assert train is not None
    labels = images.train[1]
    wanted = labels if images.test is None else images.test[1]
    similar = _similarities(train, test)
    return {
        "knn5": _vote(similar, labels, wanted, 5, _one),
        "knn20": _vote(similar, labels, wanted, 20, lambda cosine: np.exp(cosine / TEMPERATURE)),
        "knn20_majority": _vote(similar, labels, wanted, 20, _one),
        "logistic": _logistic(train, labels, test, wanted),
    }


def _similarities(train: Floats, test: Floats | None) -> Floats:
    centre = train.mean(axis=0)
    bank, queries = (_unit(each - centre) for each in (train, train if test is None else test))
    similar: Floats = queries @ bank.T
    if test is None:
        np.fill_diagonal(similar, -np.inf)
    return similar


def _unit(rows: Floats) -> Floats:
    length: Floats = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(length, 1e-12)


def _one(cosine: Floats) -> Floats:
    """A vote of 1, or a little more: of two classes with as many votes, the one with the nearer neighbours wins."""
    return 1.0 + 1e-3 * cosine


def _vote(
    similar: Floats, labels: NDArray[np.int64], wanted: NDArray[np.int64], k: int, weight: Callable[[Floats], Floats]
) -> float:
    """Accuracy of the class with the largest sum of weights among ``k`` neighbours."""
    nearest = np.argpartition(-similar, k, axis=1)[:, :k]
    votes = np.zeros((len(similar), labels.max() + 1))
    for column in nearest.T:
        rows = np.arange(len(similar))
        np.add.at(votes, (rows, labels[column]), weight(similar[rows, column]))
    return round(100 * float((votes.argmax(axis=1) == wanted).mean()), 2)


def _logistic(train: Floats, labels: NDArray[np.int64], test: Floats | None, wanted: NDArray[np.int64]) -> float:
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=300))
    if test is None:
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        predicted = cross_val_predict(probe, train, labels, cv=folds)
    else:
        chosen = np.random.default_rng(0).permutation(len(train))[:MAX_PROBE]
        predicted = probe.fit(train[chosen], labels[chosen]).predict(test)
    return round(100 * float((predicted == wanted).mean()), 2)


@torch.no_grad()
def _features(model: nn.Module, part: Any, size: int, mean: Any, std: Any) -> Floats | None:
    if part is None:
        return None
    pixels = torch.from_numpy(_resized(part[0], size)).permute(0, 3, 1, 2)
    centre, spread = (torch.tensor(each).view(1, -1, 1, 1) for each in (mean, std))
    batches = [model((batch.float() / 255 - centre) / spread) for batch in pixels.split(256)]
    return torch.cat(batches).double().numpy()


def _resized(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    if images.shape[1:3] == (size, size):
        return images
    return np.stack(
        [np.asarray(Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC)) for each in images]
    )
