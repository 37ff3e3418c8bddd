"""Labelled sources for evaluation: a set to learn or look up from, and a set to score on."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sslkit.data.formats.splits import ALL, SPLIT_OF, choose
from sslkit.data.sources.image_source import DataConfig, ImageSource, available_splits, open_source
from sslkit.errors import UserError

HELD_OUT = 0.2


@dataclass(frozen=True)
class LabelledPair:
    """Training and test images with their labels as class numbers shared by both.

    Attributes:
        train: Bank of kNN, training set of a probe.
        test: What is scored.
        train_labels: (len(train),) int64.
        test_labels: (len(test),) int64.
        classes: Class names in the order of their numbers.
        description: Which data and which split, for print.
        split: How the two sides came about: the names of their splits, or what was held out of one.
    """

    train: ImageSource
    test: ImageSource
    train_labels: Tensor
    test_labels: Tensor
    classes: list[str]
    description: str
    split: str


def open_pair(config: DataConfig, train_split: str = "train", test_split: str = "", seed: int = 0) -> LabelledPair:
    """Open both sets. Without a test split of its own, a fifth of the data is held out by a seeded draw.

    Args:
        config: The source; its own ``split`` is not used.
        train_split: Split to learn from.
        test_split: Split to score on; empty picks the first of test, validation and held-out sets, by any of their
            names, that has labels and is not learned from. With ``train_split = "all"`` nothing is picked.
        seed: Of the held-out draw.

    Raises:
        UserError: No labels, fewer than two classes, or the same split for both.
    """
    train = open_source(config.model_copy(update={"split": train_split}))
    splits = available_splits(config) if train_split != ALL else []
    learned, scored = (choose(splits, split) or [split] for split in (train_split, test_split))
    if test_split and (set(learned) & set(scored) or ALL in (train_split, test_split)):
        raise UserError(f"{config.path}: --test-split {test_split} is what is learned from too; take another, or none")
    held_out = [name for name in splits if SPLIT_OF.get(name, "train") != "train" and name not in learned]
    labels = train.labels()
    left_out: list[str] = []
    test = open_source(config.model_copy(update={"split": test_split})) if test_split else None
    for name in [] if test_split else held_out:
        found = open_source(config.model_copy(update={"split": name}))
        if found.label_column is not None:
            test, test_split = found, name
            break
        left_out.append(name)
    if test is not None:
        description = f"{config.path}: {train_split} {len(train)} / {test_split} {len(test)} images"
        split = f"{train_split} / {test_split}"
        test_words = test.labels()
    else:
        order = np.random.default_rng(seed).permutation(len(train))
        count = max(round(len(train) * HELD_OUT), 1)
        learned_rows, scored_rows = np.sort(order[count:]), np.sort(order[:count])
        train, test = train.subset(learned_rows), train.subset(scored_rows)
        labels, test_words = [labels[row] for row in learned_rows], [labels[row] for row in scored_rows]
        description = f"{config.path}: {len(order)} images, {count} of them held out (seed {seed})"
        split = f"{HELD_OUT:.0%} of {train_split} held out by seed {seed}"
    if left_out:
        description += f"; left out, as without labels: {', '.join(left_out)} (--test-split names another)"
    classes, numbers = np.unique([*labels, *test_words], return_inverse=True)
    if len(classes) < 2:
        raise UserError(
            f"{config.path}: evaluation needs images of at least two classes, found {len(classes)}: "
            f"{list(map(str, classes))}"
        )
    codes = torch.from_numpy(numbers.astype(np.int64))
    names = [str(name) for name in classes]
    return LabelledPair(train, test, codes[: len(train)], codes[len(train) :], names, description, split)
