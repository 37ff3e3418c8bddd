"""Labelled images on which start and end are compared, image by image; copies of an image never answer for it."""

import hashlib
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
from sslkit.evaluate.probes.knn import KnnProtocol, is_correct, predict_by_others
from sslkit.evaluate.probes.linear import linear_accuracy
from sslkit.text import pluralize

MOST = 5000  # images of a set that are judged, drawn by the seed
FOLDS = 5
NEIGHBOURS = 5  # as few as small classes allow
MIN_IMAGES = 10
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class JudgedImages:
    """A labelled set: images that classify, and images that are classified.

    Without a test split, each image is classified by all others (kNN), or by a probe of the other folds.

    Attributes:
        description: For messages.
        train: Images that classify.
        test: Images that are classified; None if they are those of ``train``.
        labels: (len(train),) int64.
        truth: (len(test),) int64; ``labels`` without a test split.
        copies: (len(train),) int64, equal for images of equal pixels, of the numbers of ``test_copies``.
        test_copies: Likewise for the images that are classified.
        digests: Of the pixels of the images that are classified.
        folds: (len(test),) int64 in [0, FOLDS): parts of the images that are classified, copies in one part.
    """

    description: str
    train: ImageSource
    test: ImageSource | None
    labels: Tensor
    truth: Tensor
    copies: Tensor
    test_copies: Tensor
    digests: list[str]
    folds: Tensor

    @property
    def count(self) -> int:
        """Number of images that are classified."""
        return len(self.truth)

    @property
    def copied(self) -> int:
        """How many images that are classified have a copy among those that classify."""
        if self.test is not None:
            return int(torch.isin(self.test_copies, self.copies).sum())
        _, counts = torch.unique(self.copies, return_counts=True)
        return int(counts[counts > 1].sum())

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

    def knn_correct(self, features: list[Tensor]) -> NDArray[np.bool_]:
        """Whether kNN classifies each image correctly, from the features of `sources`: (count,)."""
        predicted = predict_by_others(
            features[-1], features[0], self.labels, self.classes, self.protocol, (self.test_copies, self.copies)
        )
        return is_correct(predicted, self.truth).numpy()

    def bank_correct(self, features: Tensor) -> NDArray[np.bool_]:
        """Whether kNN classifies each image of ``train`` correctly by the others: (len(train),)."""
        copies = self.copies, self.copies
        predicted = predict_by_others(features, features, self.labels, self.classes, self.protocol, copies)
        return is_correct(predicted, self.labels).numpy()

    def linear_correct(self, features: list[Tensor]) -> NDArray[np.bool_]:
        """Whether a logistic regression classifies each image correctly, from the features of `sources`: (count,)."""
        if self.test is not None:
            kept = ~torch.isin(self.copies, self.test_copies)
            score = linear_accuracy(features[0][kept], self.labels[kept], features[1], self.truth)
            return score.correct.numpy()
        correct = np.zeros(self.count, dtype=np.bool_)
        for fold in range(FOLDS):
            tested = self.folds == fold
            if tested.any() and int((~tested).sum()) > 1:
                rows = features[0][~tested], self.labels[~tested], features[0][tested], self.labels[tested]
                correct[tested.numpy()] = linear_accuracy(*rows).correct.numpy()
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
        train, train_rows = _limit(pair.train, seed)
        test, test_rows = _limit(pair.test, seed)
        labels, truth, description = pair.train_labels[train_rows], pair.test_labels[test_rows], pair.description
    else:
        source = open_source(config)
        names = np.unique(source.labels(), return_inverse=True)[1].astype(np.int64)
        train, train_rows = _limit(source, seed)
        labels = truth = torch.from_numpy(names)[train_rows]
        test, description = (
            None,
            f"{source.description}: {pluralize(len(train), 'image')}, each classified by the others",
        )
    digests = [pixel_digests(train), pixel_digests(test) if test is not None else []]
    train, labels, digests[0] = _read_ones(train, labels, digests[0])
    if test is None:
        truth = labels
    else:
        test, truth, digests[1] = _read_ones(test, truth, digests[1])
        if len(set(digests[0]) - set(digests[1])) < 2:
            raise UserError(
                f"{description}: the training images are those of the test split, and no image may be classified by "
                "its copies; give two different sets, or one without a test split"
            )
    if len(labels) < MIN_IMAGES or len(truth) < MIN_IMAGES or len(torch.unique(labels)) < 2:
        raise UserError(
            f"{description} has {pluralize(len(truth), 'labelled image')} of "
            f"{pluralize(len(torch.unique(labels)), 'class', 'classes')}; a verdict needs {MIN_IMAGES} images and 2 "
            "classes"
        )
    numbers = torch.from_numpy(np.unique([*digests[0], *digests[1]], return_inverse=True)[1].astype(np.int64))
    copies, test_copies = numbers[: len(train)], numbers[len(train) :]
    test_copies = copies if test is None else test_copies
    return JudgedImages(
        *(description, train, test, labels, truth, copies, test_copies),
        digests=digests[0] if test is None else digests[1],
        folds=_folds(test_copies, seed),
    )


def _read_ones(source: ImageSource, labels: Tensor, digests: list[str]) -> tuple[ImageSource, Tensor, list[str]]:
    """The images that can be read, their labels and their digests."""
    kept = [index for index, digest in enumerate(digests) if not digest.startswith(UNREADABLE)]
    if len(kept) == len(digests):
        return source, labels, digests
    rows = np.array(kept, dtype=np.int64)
    return source.subset(rows), labels[torch.from_numpy(rows)], [digests[index] for index in kept]


def _limit(source: ImageSource, seed: int) -> tuple[ImageSource, NDArray[np.int64]]:
    rows = np.sort(np.random.default_rng(seed).permutation(len(source))[:MOST])
    return source.subset(rows), rows


def _folds(copies: Tensor, seed: int) -> Tensor:
    """Parts of equal size, up to copies: each distinct image is in one part with all of its copies."""
    distinct, numbers = torch.unique(copies, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(distinct))
    return torch.from_numpy(order % FOLDS)[numbers]


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
