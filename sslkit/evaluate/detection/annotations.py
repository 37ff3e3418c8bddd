"""Annotated images in the formats of PASCAL VOC and COCO."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sslkit.data.decode.background import WHITE
from sslkit.data.sources.image_identity import SAMPLE_SIZE, content_digest, file_size, spread_sample
from sslkit.errors import UserError, check_path, near_miss
from sslkit.evaluate.detection import coco, voc
from sslkit.evaluate.detection.annotated_image import AnnotatedImage
from sslkit.evaluate.protocol import digest_of

FORMATS = "VOC (JPEGImages, Annotations, ImageSets/Main) or COCO (annotations/instances_SPLIT.json and the images)"


@dataclass(frozen=True)
class AnnotatedPair:
    """Training and test images with objects. Class number ``i`` is ``classes[i - 1]``."""

    train: list[AnnotatedImage]
    test: list[AnnotatedImage]
    classes: list[str]
    description: str  # data, splits and number of images, for messages
    format: Literal["voc", "coco"]
    split: str  # names of the two splits

    def settings(self) -> dict[str, Any]:
        """The settings of the data for the protocol hash."""
        return {
            "split": self.split,
            "train_images": len(self.train),
            "test_images": len(self.test),
            "train_digest": annotated_images_digest(self.train),
            "test_digest": annotated_images_digest(self.test),
            "labels": digest_of("\0".join(self.classes).encode()),
        }


def open_annotated(
    folder: str | Path, train_split: str = "", test_split: str = "", background: str = WHITE
) -> AnnotatedPair:
    """Read a data set in VOC or COCO format.

    A folder with VOC2007 and VOC2012 is one data set: a split has the images of every year, as trainval07+12 of the
    papers. ``test_split`` is by default test, val, valid or validation, with or without a year; ``train_split`` is
    trainval (VOC with a test split) or train. ``background`` is the colour behind transparent pixels. Raises
    `UserError` if the folder has neither format or not these splits, or an annotation cannot be read.
    """
    check_path(folder, "--data")
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"--data: {folder} is not a folder")
    years, files = voc.find_years(folder), coco.find_splits(folder)
    if not years and not files:
        raise UserError(f"--data: {folder} has neither format: {FORMATS}")
    splits = voc.splits_of(years) if years else list(files)
    test_split = _choose(folder, splits, test_split, "--test-split", ("test", "val", "valid", "validation"))
    preferred = ("trainval", "train") if test_split.startswith("test") else ("train",)
    train_split = _choose(folder, splits, train_split, "--train-split", preferred)
    if train_split == test_split:
        raise UserError(f"--test-split: {test_split!r} is also the training split; name another split")
    read: Any = (lambda split: voc.read_split(years, split)) if years else lambda split: coco.read_split(files[split])
    (train, train_names), (test, test_names) = read(train_split), read(test_split)
    if not years:
        test_names = _shared_categories(train_names, test_names, test, f"{folder}: {test_split}", train_split)
    numbers = {name: number for number, name in enumerate(sorted({*train_names.values(), *test_names.values()}), 1)}
    for images, names in ((train, train_names), (test, test_names)):
        for index, image in enumerate(images):
            labels = np.array([numbers[names[label]] for label in image.labels.tolist()], dtype=np.int64)
            images[index] = replace(image, labels=labels, background=background)
    if not any(image.trainable().any() for image in train):
        raise UserError(f"{folder}: split {train_split!r} has no object to train on; all are crowds or have no area")
    if not any(image.scored().any() for image in test):
        raise UserError(
            f"{folder}: split {test_split!r} has no object to score; all are difficult, crowds or have no area"
        )
    description = f"{folder}: {train_split} {len(train)} / {test_split} {len(test)} images, {len(numbers)} classes"
    kind: Literal["voc", "coco"] = "voc" if years else "coco"
    return AnnotatedPair(train, test, list(numbers), description, kind, f"{train_split} / {test_split}")


def annotated_images_digest(images: Sequence[AnnotatedImage]) -> str:
    """First 16 hexadecimal digits of a SHA-256 of names, sizes and boxes, and of the content of a sample."""
    digest = hashlib.sha256(str(len(images)).encode())
    for image in images:
        size = file_size(str(image.file))
        digest.update(f"{image.file.name}\0{size}\0{image.width}\0{image.height}\0".encode())
        for numbers in (image.boxes, image.labels, image.ignored):
            digest.update(numbers.tobytes())
    for index in spread_sample(len(images), SAMPLE_SIZE):
        digest.update(bytes.fromhex(content_digest(images[index].file.read_bytes)) or b"unreadable")
    return digest.hexdigest()[:16]


def _choose(folder: Path, splits: list[str], requested: str, option: str, preferred: tuple[str, ...]) -> str:
    if requested:
        if requested not in splits:
            hint = near_miss(requested, splits)
            raise UserError(f"{option}: {folder} has no split {requested!r}{hint}; it has {', '.join(sorted(splits))}")
        return requested
    for word in preferred:
        # Exact names first: "trainval" also starts with "train".
        found = [word] if word in splits else sorted(name for name in splits if name.rstrip("0123456789_-") == word)
        if found:
            return found[-1]
    names = ", ".join(sorted(splits))
    raise UserError(f"{option}: {folder} has no split {' or '.join(preferred)}; it has {names}: name one")


def _shared_categories(
    train_names: dict[int, str], test_names: dict[int, str], test: list[AnnotatedImage], where: str, train_split: str
) -> dict[int, str]:
    """The COCO categories that both files list. A category in one file only must have no test objects."""
    numbers = {name: number for number, name in train_names.items()}
    used = {label for image in test for label in image.labels.tolist()}
    for number, name in test_names.items():
        if train_names.get(number, name) != name:
            raise UserError(
                f"{where}: category {number} is {name!r}, but {train_names[number]!r} in {train_split}; use one name"
            )
        if number not in train_names and name in numbers:
            raise UserError(
                f"{where}: category {name!r} has id {number}, but {numbers[name]} in {train_split}; use one id"
            )
        if number not in train_names and number in used:
            raise UserError(f"{where}: has objects of category {name!r}, which {train_split} does not list")
    return {number: name for number, name in test_names.items() if number in train_names}
