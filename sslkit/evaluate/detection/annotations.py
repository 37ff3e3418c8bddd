"""Folders of pictures with boxes, in the formats of PASCAL VOC and COCO."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sslkit.data.decode.background import WHITE
from sslkit.errors import UserError, check_path, near_miss
from sslkit.evaluate.detection import coco, voc
from sslkit.evaluate.detection.annotated_image import Picture

LAYOUTS = "VOC (JPEGImages, Annotations, ImageSets/Main) or COCO (annotations/instances_SPLIT.json beside the images)"


@dataclass(frozen=True)
class AnnotatedPair:
    """Pictures to learn from and pictures to score on.

    Attributes:
        train: To learn from.
        test: To score on.
        classes: Names; class number ``i`` of a picture is ``classes[i - 1]``.
        description: Which data and which split, for print.
        format: What the folder was read as.
        split: The names of the two splits.
    """

    train: list[Picture]
    test: list[Picture]
    classes: list[str]
    description: str
    format: Literal["voc", "coco"]
    split: str


def open_annotated(
    folder: str | Path, train_split: str = "", test_split: str = "", background: str = WHITE
) -> AnnotatedPair:
    """Read a folder in VOC or COCO format.

    A folder that holds VOC2007 and VOC2012 is one data set: the pictures of a split are those of every year that has
    it, as in the papers' trainval07+12.

    Args:
        folder: The data set.
        train_split: What is learned from; empty takes VOC's trainval where there is a test split, else train; COCO's
            split whose name starts with ``train``.
        test_split: What is scored on; empty takes test, else val, valid or validation, with or without a year after it.
        background: What transparent pixels are composited over.

    Raises:
        UserError: Neither format, a split that is not there, or annotations that cannot be read.
    """
    check_path(folder, "--data")
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"--data: {folder} is not a folder")
    years, files = voc.find_years(folder), coco.find_splits(folder)
    if not years and not files:
        raise UserError(f"--data: {folder} is in neither format: {LAYOUTS}")
    splits = voc.splits_of(years) if years else list(files)
    test_split = _choose(folder, splits, test_split, "--test-split", ("test", "val", "valid", "validation"))
    preferred = ("trainval", "train") if test_split.startswith("test") else ("train",)
    train_split = _choose(folder, splits, train_split, "--train-split", preferred)
    if train_split == test_split:
        raise UserError(f"--test-split: {test_split!r} is what is learned from; score on another split")
    read: Any = (lambda split: voc.read_split(years, split)) if years else lambda split: coco.read_split(files[split])
    (train, train_names), (test, test_names) = read(train_split), read(test_split)
    if not years:
        test_names = _shared(train_names, test_names, test, f"{folder}: {test_split}", train_split)
    numbers = {name: number for number, name in enumerate(sorted({*train_names.values(), *test_names.values()}), 1)}
    train, test = (
        [replace(_numbered(picture, names, numbers), background=background) for picture in pictures]
        for pictures, names in ((train, train_names), (test, test_names))
    )
    if not any(picture.usable().any() for picture in train):
        raise UserError(f"{folder}: split {train_split!r} has nothing to learn from, no object with a box but crowds")
    if not any(picture.counted().any() for picture in test):
        raise UserError(
            f"{folder}: split {test_split!r} has no object that a score counts, "
            "one with an area, neither difficult nor a crowd"
        )
    description = f"{folder}: {train_split} {len(train)} / {test_split} {len(test)} pictures, {len(numbers)} classes"
    layout: Literal["voc", "coco"] = "voc" if years else "coco"
    return AnnotatedPair(train, test, list(numbers), description, layout, f"{train_split} / {test_split}")


def _choose(folder: Path, splits: list[str], asked: str, option: str, preferred: tuple[str, ...]) -> str:
    if asked:
        if asked not in splits:
            raise UserError(f"{option}: {folder} has no {asked!r}{near_miss(asked, splits)}; it has {sorted(splits)}")
        return asked
    for word in preferred:
        # Exact names first: "trainval" also starts with "train".
        found = [word] if word in splits else sorted(name for name in splits if name.rstrip("0123456789_-") == word)
        if found:
            return found[-1]
    raise UserError(f"{option}: {folder} has no split {' or '.join(preferred)}; it has {sorted(splits)}, name one")


def _shared(
    train_names: dict[int, str], test_names: dict[int, str], test: list[Picture], where: str, train_split: str
) -> dict[int, str]:
    """Those of COCO's categories that both files list; categories that only a file lists may be there, unused."""
    numbers = {name: number for number, name in train_names.items()}
    used = {label for picture in test for label in picture.labels.tolist()}
    for number, name in test_names.items():
        if train_names.get(number, name) != name:
            raise UserError(
                f"{where} has category {number} as {name!r}, {train_split} as {train_names[number]!r}; name it alike"
            )
        if number not in train_names and name in numbers:
            raise UserError(
                f"{where} has category {name!r} as {number}, {train_split} as {numbers[name]}; number it alike"
            )
        if number not in train_names and number in used:
            raise UserError(f"{where} has objects of category {name!r}, which {train_split} does not list")
    return {number: name for number, name in test_names.items() if number in train_names}


def _numbered(picture: Picture, names: dict[int, str], numbers: dict[str, int]) -> Picture:
    labels: NDArray[np.int64] = np.array([numbers[names[label]] for label in picture.labels.tolist()], dtype=np.int64)
    return picture.relabelled(labels)
