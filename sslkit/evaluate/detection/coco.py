"""COCO's format: one JSON file per split, and images in a folder near it."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sslkit.errors import UserError
from sslkit.evaluate.detection.annotated_image import AnnotatedImage, as_boxes

EXPORTED = "_annotations.coco.json"  # written into a split's folder by labelling tools
Row = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """An annotation file, and the folders that may have its images."""

    file: Path
    folders: tuple[Path, ...]


def find_splits(folder: Path) -> dict[str, Split]:
    """Find splits by name.

    These are ``annotations/instances_SPLIT.json`` or ``instances_SPLIT.json`` with images in ``SPLIT``,
    ``images/SPLIT``, ``images`` or the folder itself, and ``SPLIT/_annotations.coco.json`` with images in ``SPLIT``.
    """
    splits = {}
    for file in sorted([*folder.glob("annotations/instances_*.json"), *folder.glob("instances_*.json")]):
        name = file.stem.removeprefix("instances_")
        splits[name] = Split(file, (folder / name, folder / "images" / name, folder / "images", folder))
    for file in sorted(folder.glob(f"*/{EXPORTED}")):
        splits[file.parent.name] = Split(file, (file.parent,))
    return splits


def read_split(split: Split) -> tuple[list[AnnotatedImage], dict[int, str]]:
    """Read the images of a split in the file's order, and the category names by number."""
    try:
        content = json.loads(split.file.read_text(encoding="utf-8-sig"))
        categories = [(_integer(row, "id", at), _text(row, "name", at)) for at, row in _rows(content, "categories")]
        names = dict(categories)
        if len(names) < len(set(categories)):
            raise ValueError("two categories have the same id")
        images = _rows(content, "images")
        objects: dict[int, list[Row]] = {_integer(image, "id", where): [] for where, image in images}
        if len(objects) < len(images):
            raise ValueError("two images have the same id")
        for where, row in _rows(content, "annotations"):
            if _integer(row, "category_id", where) not in names:
                raise ValueError(f"{where} has the unknown category {row['category_id']}")
            if _integer(row, "image_id", where) not in objects:
                raise ValueError(f"{where} has the unknown image {row['image_id']}")
            _check_object(row, where)
            objects[row["image_id"]].append(row)
        folder = _find_folder(split, [_text(image, "file_name", where) for where, image in images])
        return [_read_image(image, where, objects[image["id"]], folder) for where, image in images], names
    except UserError:
        raise
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{split.file}: is not a readable COCO annotation ({error})") from error


def _rows(content: Any, key: str) -> list[tuple[str, Row]]:
    """The rows of a list, each with its position for error messages."""
    if not isinstance(content, dict):
        raise ValueError("the file is not an object with images, annotations and categories")
    table = _field(content, key, "the file")
    if not isinstance(table, list):
        raise ValueError(f"{key} is {_shown(table)}, not a list")
    for index, row in enumerate(table):
        if not isinstance(row, dict):
            raise ValueError(f"{key}[{index}] is {_shown(row)}, not an object")
    return [(f"{key}[{index}]", row) for index, row in enumerate(table)]


def _field(row: Row, key: str, where: str) -> Any:
    if key not in row:
        raise ValueError(f"{where} has no {key!r}")
    return row[key]


def _integer(row: Row, key: str, where: str) -> int:
    value = _field(row, key, where)
    if type(value) is int or (type(value) is float and value.is_integer()):
        return int(value)
    raise ValueError(f"{key} of {where} is {_shown(value)}, not an integer")


def _text(row: Row, key: str, where: str) -> str:
    value = _field(row, key, where)
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"{key} of {where} is {_shown(value)}, not a string")


def _shown(value: Any) -> str:
    """A value as JSON, at most 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_object(row: Row, where: str) -> None:
    _field(row, "bbox", where)
    crowd, area = row.get("iscrowd", 0), row.get("area", 0.0)
    if type(crowd) not in (int, float, bool) or crowd not in (0, 1):
        raise ValueError(f"iscrowd of {where} is {_shown(crowd)}, not 0 or 1")
    if type(area) not in (int, float):
        raise ValueError(f"area of {where} is {_shown(area)}, not a number")


def _find_folder(split: Split, names: list[str]) -> Path:
    """The first folder that has all images."""
    if not names:
        raise ValueError("it lists no images")
    missing = {}
    for folder in split.folders:
        missing[folder] = _missing_files(folder, names)
        if not missing[folder]:
            return folder
    best = min(split.folders, key=lambda folder: len(missing[folder]))
    if len(missing[best]) == len(names):
        folders = ", ".join(str(folder) for folder in split.folders)
        raise UserError(f"{split.file}: its image {names[0]} is in none of {folders}")
    raise UserError(
        f"{split.file}: {len(missing[best])} of its {len(names)} images are not in {best}, such as {missing[best][0]}; "
        "add the files or remove their rows"
    )


def _missing_files(folder: Path, names: list[str]) -> list[str]:
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        path = os.path.join(folder, name)
        parent, base = os.path.split(path)
        if parent not in listed:
            listed[parent] = _files_in(parent)
        # Some file systems accept other spellings than they list, and some folders cannot be listed.
        if base not in listed[parent] and not os.path.isfile(path):
            missing.append(name)
    return missing


def _files_in(folder: str) -> set[str]:
    """Names of the files in a folder. One listing is faster than one check per file."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):
        return set()


def _read_image(image: Row, where: str, objects: list[Row], folder: Path) -> AnnotatedImage:
    boxes = as_boxes([row["bbox"] for row in objects], image["file_name"])
    boxes[:, 2:] += boxes[:, :2]  # from width and height to right and bottom
    crowds = np.array([bool(row.get("iscrowd", 0)) for row in objects], dtype=bool)
    box_areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    areas = [row.get("area", area) for row, area in zip(objects, box_areas, strict=True)]
    segments = [row.get("segmentation") for row in objects]
    return AnnotatedImage(
        file=folder / image["file_name"],
        width=_integer(image, "width", where),
        height=_integer(image, "height", where),
        boxes=boxes,
        labels=np.array([int(row["category_id"]) for row in objects], dtype=np.int64),
        ignored=crowds,
        crowds=crowds,
        areas=np.array(areas, dtype=np.float64),
        segments=tuple(segments) if all(segments) else (),
    )
