"""COCO's format: one JSON file a split, pictures in a folder near it."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sslkit.errors import UserError
from sslkit.evaluate.detection.annotated_image import Picture, as_boxes

EXPORTED = "_annotations.coco.json"  # the name labelling tools give the file inside a split's folder
Row = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """An annotation file and where its pictures may be."""

    file: Path
    folders: tuple[Path, ...]


def find_splits(folder: Path) -> dict[str, Split]:
    """Splits by name.

    Found are ``annotations/instances_SPLIT.json`` or ``instances_SPLIT.json`` with pictures in ``SPLIT``,
    ``images/SPLIT``, ``images`` or the folder itself, and ``SPLIT/_annotations.coco.json`` with pictures beside it.
    """
    splits = {}
    for file in sorted([*folder.glob("annotations/instances_*.json"), *folder.glob("instances_*.json")]):
        name = file.stem.removeprefix("instances_")
        splits[name] = Split(file, (folder / name, folder / "images" / name, folder / "images", folder))
    for file in sorted(folder.glob(f"*/{EXPORTED}")):
        splits[file.parent.name] = Split(file, (file.parent,))
    return splits


def read_split(split: Split) -> tuple[list[Picture], dict[int, str]]:
    """Every picture of a split, in the file's order, and the category names behind their numbers."""
    try:
        content = json.loads(split.file.read_text(encoding="utf-8-sig"))
        categories = [(_whole(row, "id", at), _text(row, "name", at)) for at, row in _rows(content, "categories")]
        names = dict(categories)
        if len(names) < len(set(categories)):
            raise ValueError("two categories have the same id")
        images = _rows(content, "images")
        objects: dict[int, list[Row]] = {_whole(image, "id", where): [] for where, image in images}
        if len(objects) < len(images):
            raise ValueError("two images have the same id")
        for where, thing in _rows(content, "annotations"):
            if _whole(thing, "category_id", where) not in names:
                raise ValueError(f"{where} has the unknown category {thing['category_id']}")
            if _whole(thing, "image_id", where) not in objects:
                raise ValueError(f"{where} has the unknown image {thing['image_id']}")
            _check_object(thing, where)
            objects[thing["image_id"]].append(thing)
        folder = _folder_of(split, [_text(image, "file_name", where) for where, image in images])
        pictures = [_read_picture(image, where, objects[image["id"]], folder) for where, image in images]
    except UserError:
        raise
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{split.file}: is not a readable COCO annotation ({error})") from error
    return pictures, names


def _rows(content: Any, key: str) -> list[tuple[str, Row]]:
    """The rows of a table, each with its place in the file as an error names it."""
    if not isinstance(content, dict):
        raise ValueError("it holds no object with images, annotations and categories")
    table = _field(content, key, "it")
    if not isinstance(table, list):
        raise ValueError(f"its {key} are {_written(table)}, not a list")
    for place, row in enumerate(table):
        if not isinstance(row, dict):
            raise ValueError(f"{key}[{place}] is {_written(row)}, not an object with named fields")
    return [(f"{key}[{place}]", row) for place, row in enumerate(table)]


def _field(row: Row, key: str, where: str) -> Any:
    if key not in row:
        raise ValueError(f"{where} has no {key!r}")
    return row[key]


def _whole(row: Row, key: str, where: str) -> int:
    value = _field(row, key, where)
    if type(value) is int or (type(value) is float and value.is_integer()):
        return int(value)
    raise ValueError(f"{key} of {where} is {_written(value)}, not a whole number")


def _text(row: Row, key: str, where: str) -> str:
    value = _field(row, key, where)
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"{key} of {where} is {_written(value)}, not a text")


def _written(value: Any) -> str:
    """A value as the file has it, at most 60 characters of it."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_object(thing: Row, where: str) -> None:
    _field(thing, "bbox", where)
    crowd, area = thing.get("iscrowd", 0), thing.get("area", 0.0)
    if type(crowd) not in (int, float, bool) or crowd not in (0, 1):
        raise ValueError(f"iscrowd of {where} is {_written(crowd)}, not 0 or 1")
    if type(area) not in (int, float):
        raise ValueError(f"area of {where} is {_written(area)}, not a number")


def _folder_of(split: Split, names: list[str]) -> Path:
    """The first folder that has every picture."""
    if not names:
        raise ValueError("it lists no images")
    lacks = {}
    for folder in split.folders:
        lacks[folder] = _missing(folder, names)
        if not lacks[folder]:
            return folder
    best = min(split.folders, key=lambda folder: len(lacks[folder]))
    if len(lacks[best]) == len(names):
        places = ", ".join(str(folder) for folder in split.folders)
        raise UserError(f"{split.file}: its picture {names[0]} is in none of {places}")
    raise UserError(
        f"{split.file}: {len(lacks[best])} of the {len(names)} pictures it lists cannot be found in {best}, "
        f"for one {lacks[best][0]}; add the files or take their rows away"
    )


def _missing(folder: Path, names: list[str]) -> list[str]:
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        path = os.path.join(folder, name)
        parent, base = os.path.split(path)
        if parent not in listed:
            listed[parent] = _files_in(parent)
        # Some file systems find a file by another spelling than they list, and some folders may not be listed.
        if base not in listed[parent] and not os.path.isfile(path):
            missing.append(name)
    return missing


def _files_in(folder: str) -> set[str]:
    """One listing costs less than a look at every file."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):
        return set()


def _read_picture(image: Row, where: str, things: list[Row], folder: Path) -> Picture:
    corners = as_boxes([thing["bbox"] for thing in things], image["file_name"])
    corners[:, 2:] += corners[:, :2]
    crowds = np.array([bool(thing.get("iscrowd", 0)) for thing in things], dtype=bool)
    sizes = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
    drawn = [thing.get("segmentation") for thing in things]
    return Picture(
        file=folder / image["file_name"],
        width=_whole(image, "width", where),
        height=_whole(image, "height", where),
        boxes=corners,
        labels=np.array([int(thing["category_id"]) for thing in things], dtype=np.int64),
        ignored=crowds,
        crowds=crowds,
        areas=np.array([thing.get("area", size) for thing, size in zip(things, sizes, strict=True)], dtype=np.float64),
        segments=tuple(drawn) if all(drawn) else (),
    )
