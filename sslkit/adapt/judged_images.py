"""Labelled images on which start and end are compared, image by image; copies of an image count once."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.formats.splits import SPLIT_OF
from sslkit.data.sources.image_source import DataConfig, ImageSource, available_splits, open_source
from sslkit.errors import UserError
from sslkit.evaluate.labelled_data import open_pair
from sslkit.evaluate.probes.knn import KnnProtocol, is_correct, predict, predict_by_others, share_correct
from sslkit.evaluate.probes.linear import linear_accuracy
from sslkit.text import pluralize

MOST = 5000  # images of a set that are judged, drawn by the seed
FOLDS = 5
NEIGHBOURS = 5  # as few as small classes allow
MIN_IMAGES = 10
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class JudgedImages:
    """A labelled set: images that classify, and images that are classified. No two of them have equal pixels.

    Without a test split, the images are cut into `FOLDS` parts, and each part is classified by the others.

    Attributes:
        description: For messages.
        train: Images that classify.
        test: Images that are classified; None if they are those of ``train``.
        labels: (len(train),) int64.
        truth: (len(test),) int64; ``labels`` without a test split.
        digests: Of the pixels of the images that are classified.
        folds: (len(test),) int64 in [0, FOLDS): the part of each image that is classified.
        copied: How many images were left out as copies of others.
    """

    description: str
    train: ImageSource
    test: ImageSource | None
    labels: Tensor
    truth: Tensor
    digests: list[str]
    folds: Tensor
    copied: int = 0

    @property
    def count(self) -> int:
        """Number of images that are classified."""
        return len(self.truth)

    @cached_property
    def classes(self) -> int:
        """Number of classes."""
        return int(max(self.labels.max(), self.truth.max())) + 1

    @property
    def protocol(self) -> KnnProtocol:
        """kNN of few neighbours, centred."""
        return KnnProtocol(min(NEIGHBOURS, len(self.labels) - 1), centre=True)

    @property
    def sources(self) -> list[ImageSource]:
        """The images whose features are needed."""
        return [self.train] if self.test is None else [self.train, self.test]

    @cached_property
    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """Positions of the images that classify and of those that are classified by them: one part with a test split.

        What a part is judged with is chosen by its images that classify.
        """
        if self.test is not None:
            return [(torch.arange(len(self.labels)), torch.arange(self.count))]
        return [
            (torch.nonzero(self.folds != n).flatten(), torch.nonzero(self.folds == n).flatten()) for n in range(FOLDS)
        ]

    def knn(self, features: list[Tensor]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Classify by kNN, from the features of `sources`.

        Returns:
            Whether each image is classified correctly, (count,), and the accuracy on the images that classify, each
            by the others of its part, (len(parts),).
        """
        correct = np.zeros(self.count, dtype=np.bool_)
        choosing = []
        for bank, tested in self.parts:
            rows, labels = features[0][bank], self.labels[bank]
            [predicted] = predict(features[-1][tested], rows, labels, self.classes, [self.protocol])
            correct[tested.numpy()] = is_correct(predicted, self.truth[tested]).numpy()
            numbers = torch.arange(len(bank))
            predicted = predict_by_others(rows, rows, labels, self.classes, self.protocol, (numbers, numbers))
            choosing.append(share_correct(predicted, labels))
        return correct, np.array(choosing)

    def linear_correct(self, features: Sequence[list[Tensor]]) -> NDArray[np.bool_]:
        """Whether a logistic regression classifies each image correctly, from the features of `sources` for each part.

        The result has the shape (count,).
        """
        correct = np.zeros(self.count, dtype=np.bool_)
        for (bank, tested), used in zip(self.parts, features, strict=True):
            score = linear_accuracy(used[0][bank], self.labels[bank], used[-1][tested], self.truth[tested])
            correct[tested.numpy()] = score.correct.numpy()
        return correct


def open_judged(config: DataConfig, option: str, seed: int = 0) -> JudgedImages:
    """`_open_judged`, whose messages then begin with the ``option``."""
    try:
        return _open_judged(config, seed)
    except UserError as error:
        raise UserError(*(f"{option}: {message}" for message in error.messages)) from error


def _open_judged(config: DataConfig, seed: int) -> JudgedImages:
    """Open a labelled set, with its test split if it has one.

    Raises:
        UserError: It has no labels, or too few images or classes.
    """
    splits = available_splits(config)
    if any(SPLIT_OF.get(name, "train") != "train" for name in splits):
        pair = open_pair(config, seed=seed)
        all_of_train = _distinct(pair.train, pair.train_labels, seed)
        test = _distinct(pair.test, pair.test_labels, seed)
        train, description = all_of_train.without(test), pair.description
        copied = train.copies + test.copies
        if len(train.digests) < min(2, len(all_of_train.digests)):
            raise UserError(
                f"{description}: the training images are those of the test split, and no image may be classified by "
                "its copies; give two different sets, or one without a test split"
            )
    else:
        source = open_source(config)
        names = np.unique(source.labels(), return_inverse=True)[1].astype(np.int64)
        test = train = _distinct(source, torch.from_numpy(names), seed)
        description, copied = source.description, train.copies
    images, classes = min(len(train.digests), len(test.digests)), len(torch.unique(train.labels))
    if images < MIN_IMAGES or classes < 2:
        left_out = f" ({copied} left out as copies)" if copied else ""
        raise UserError(
            f"{description} has {pluralize(images, 'labelled image')}{left_out} of "
            f"{pluralize(classes, 'class', 'classes')}; a verdict needs {MIN_IMAGES} different images and 2 classes"
        )
    if test is train:
        description = f"{description}: {pluralize(images, 'image')}, each fifth of them classified by the others"
    order = np.random.default_rng(seed).permutation(len(test.labels))
    return JudgedImages(
        *(description, train.source, None if test is train else test.source, train.labels, test.labels, test.digests),
        folds=torch.from_numpy(order % FOLDS),
        copied=copied,
    )


@dataclass(frozen=True)
class _Distinct:
    """Images of which no two have equal pixels, and how many copies were left out."""

    source: ImageSource
    labels: Tensor
    digests: list[str]
    copies: int

    def at(self, kept: list[int], copies: int) -> "_Distinct":
        """Some of the images."""
        rows = np.array(kept, dtype=np.int64)
        digests = [self.digests[row] for row in kept]
        return _Distinct(self.source.subset(rows), self.labels[torch.from_numpy(rows)], digests, copies)

    def without(self, others: "_Distinct") -> "_Distinct":
        """The images that are not among the others."""
        seen = set(others.digests)
        kept = [row for row, digest in enumerate(self.digests) if digest not in seen]
        return self.at(kept, self.copies + len(self.digests) - len(kept))


def _distinct(source: ImageSource, labels: Tensor, seed: int) -> _Distinct:
    """At most `MOST` images, without unreadable ones; of images with equal pixels, the first."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(source))[:MOST])
    images = source.subset(rows)
    digests = pixel_digests(images)
    readable = [digest for digest in digests if not digest.startswith(UNREADABLE)]
    first: dict[str, int] = {}
    for row, digest in enumerate(digests):
        if not digest.startswith(UNREADABLE):
            first.setdefault(digest, row)
    return _Distinct(images, labels[torch.from_numpy(rows)], digests, 0).at(
        list(first.values()), len(readable) - len(first)
    )


def pixel_digests(source: ImageSource) -> list[str]:
    """A digest of the decoded pixels of each image; of an unreadable one, its name."""
    found = []
    for index in range(len(source)):
        try:
            pixels = source.read(index)
            found.append(hashlib.blake2b(pixels.tobytes() + str(pixels.shape).encode(), digest_size=16).hexdigest())
        except UnreadableImage:
            found.append(f"{UNREADABLE} {source.name(index)}")
    return found
