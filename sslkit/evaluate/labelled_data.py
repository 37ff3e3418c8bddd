"""Labelled images for evaluation: a training set and a test set."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sslkit.data.formats.splits import ALL, SPLIT_OF, choose
from sslkit.data.sources.image_source import DataConfig, ImageSource, available_splits, open_source
from sslkit.errors import UserError

HELD_OUT = 0.2


@dataclass(frozen=True)
class Splits:
    """Names of the splits to train on (for kNN, the bank of neighbours; empty takes ``train``) and to test on.

    An empty ``test`` takes the first of test, validation and held-out splits, under any of their names, that has labels
    and is not trained on. If there is none, or ``train`` is ``"all"``, a fifth of the training images is held out.
    """

    train: str = ""
    test: str = ""


@dataclass(frozen=True)
class LabelledPair:
    """Training and test images. Both use the same class numbers.

    Attributes:
        train: Bank of kNN, training set of a probe.
        test: Test set.
        train_labels: (len(train),) int64.
        test_labels: (len(test),) int64.
        classes: Class names in the order of their numbers.
        description: Data, splits and number of images, for messages.
        split: Names of the two splits, or how the test set was held out.
    """

    train: ImageSource
    test: ImageSource
    train_labels: Tensor
    test_labels: Tensor
    classes: list[str]
    description: str
    split: str


def open_pair(config: DataConfig, train_split: str = "train", test_split: str = "", seed: int = 0) -> LabelledPair:
    """Open the training and the test set; see `Splits`. The ``split`` of ``config`` is not used.

    ``seed`` draws the held-out images. Raises `UserError` if there are no labels or fewer than two classes, or if the
    splits are the same.
    """
    train = open_source(config.model_copy(update={"split": train_split}))
    splits = available_splits(config) if train_split != ALL else []
    trained_on, tested_on = (choose(splits, split) or [split] for split in (train_split, test_split))
    if test_split and (set(trained_on) & set(tested_on) or ALL in (train_split, test_split)):
        raise UserError(
            f"{config.path}: --test-split {test_split} is also the training split; name another split, or none"
        )
    others = [name for name in splits if SPLIT_OF.get(name, "train") != "train" and name not in trained_on]
    labels = train.labels()
    unlabelled: list[str] = []
    test = open_source(config.model_copy(update={"split": test_split})) if test_split else None
    for name in [] if test_split else others:
        found = open_source(config.model_copy(update={"split": name}))
        if found.label_column is not None:
            test, test_split = found, name
            break
        unlabelled.append(name)
    if test is not None:
        description = f"{config.path}: {train_split} {len(train)} / {test_split} {len(test)} images"
        split = f"{train_split} / {test_split}"
        test_labels = test.labels()
    else:
        order = np.random.default_rng(seed).permutation(len(train))
        count = max(round(len(train) * HELD_OUT), 1)
        train_rows, test_rows = np.sort(order[count:]), np.sort(order[:count])
        train, test = train.subset(train_rows), train.subset(test_rows)
        labels, test_labels = [labels[row] for row in train_rows], [labels[row] for row in test_rows]
        description = f"{config.path}: {len(order)} images, {count} of them held out (seed {seed})"
        split = f"{HELD_OUT:.0%} of {train_split} held out by seed {seed}"
    if unlabelled:
        description += f"; splits without labels: {', '.join(unlabelled)} (--test-split names another)"
    classes, numbers = np.unique([*labels, *test_labels], return_inverse=True)
    names = [str(name) for name in classes]
    if len(names) < 2:
        raise UserError(f"{config.path}: evaluation needs at least 2 classes, but there are {len(names)}: {names}")
    codes = torch.from_numpy(numbers.astype(np.int64))
    return LabelledPair(train, test, codes[: len(train)], codes[len(train) :], names, description, split)
