"""COCO's format: one JSON file per split, and images in a folder near it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sslkit.errors import UserError
from sslkit.evaluate.detection.annotated_image import AnnotatedImage, as_boxes

EXPORTED = "_annotations.coco.json"  # written into a split's folder by labelling tools
# Fields of each list of the file, and what their values must be.
FIELDS = {
    "categories": {"id": "an integer", "name": "a string"},
    "images": {"id": "an integer", "file_name": "a string", "width": "an integer", "height": "an integer"},
    "annotations": {
        **{"image_id": "an integer", "category_id": "an integer", "bbox": "a list"},
        **{"iscrowd": "0 or 1", "area": "a number"},
    },
}
OPTIONAL = ("iscrowd", "area")
FITS: dict[str, Callable[[Any], bool]] = {
    "an integer": lambda value: type(value) is int or (type(value) is float and value.is_integer()),
    "a string": lambda value: isinstance(value, str) and value != "",
    "a list": lambda value: True,  # `as_boxes` checks it
    "0 or 1": lambda value: type(value) in (int, float, bool) and value in (0, 1),
    "a number": lambda value: type(value) in (int, float),
}
Row = dict[str, Any]
Split = tuple[Path, list[Path]]  # an annotation file, and the folders that may have its images


def find_splits(folder: Path) -> dict[str, Split]:
    """Find splits by name.

    These are ``annotations/instances_SPLIT.json`` or ``instances_SPLIT.json`` with images in ``SPLIT``,
    ``images/SPLIT``, ``images`` or the folder itself, and ``SPLIT/_annotations.coco.json`` with images in ``SPLIT``.
    """
    splits: dict[str, Split] = {}
    for file in sorted([*folder.glob("annotations/instances_*.json"), *folder.glob("instances_*.json")]):
        name = file.stem.removeprefix("instances_")
        splits[name] = file, [folder / name, folder / "images" / name, folder / "images", folder]
    for file in sorted(folder.glob(f"*/{EXPORTED}")):
        splits[file.parent.name] = file, [file.parent]
    return splits


def read_split(split: Split) -> tuple[list[AnnotatedImage], dict[int, str]]:
    """Read the images of a split in the file's order, and the category names by number."""
    file, folders = split
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        categories, images, annotations = (_rows(content, key) for key in FIELDS)
        names = {int(row["id"]): row["name"] for row in categories}
        if len(names) < len({(row["id"], row["name"]) for row in categories}):
            raise ValueError("two categories have the same id")
        objects: dict[int, list[Row]] = {row["id"]: [] for row in images}
        if len(objects) < len(images):
            raise ValueError("two images have the same id")
        for index, row in enumerate(annotations):
            if row["category_id"] not in names:
                raise ValueError(f"annotations[{index}] has the unknown category {row['category_id']}")
            if row["image_id"] not in objects:
                raise ValueError(f"annotations[{index}] has the unknown image {row['image_id']}")
            objects[row["image_id"]].append(row)
        folder = _find_folder(file, folders, [row["file_name"] for row in images])
        return [_read_image(row, objects[row["id"]], folder) for row in images], names
    except UserError:
        raise
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{file}: is not a readable COCO annotation ({error})") from error


def _rows(content: Any, key: str) -> list[Row]:
    """The rows of a list, with all fields checked."""
    if not isinstance(content, dict):
        raise ValueError("the file is not an object with images, annotations and categories")
    if key not in content:
        raise ValueError(f"the file has no {key!r}")
    rows: Any = content[key]
    if not isinstance(rows, list):
        raise ValueError(f"{key} is {_shown(rows)}, not a list")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{key}[{index}] is {_shown(row)}, not an object")
        for field, kind in FIELDS[key].items():
            if field not in row and field not in OPTIONAL:
                raise ValueError(f"{key}[{index}] has no {field!r}")
            if field in row and not FITS[kind](row[field]):
                raise ValueError(f"{field} of {key}[{index}] is {_shown(row[field])}, not {kind}")
    return rows


def _shown(value: Any) -> str:
    """A value as JSON, at most 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _find_folder(file: Path, folders: list[Path], names: list[str]) -> Path:
    """The first folder that has all images."""
    if not names:
        raise ValueError("it lists no images")
    missing = {}
    for folder in folders:
        missing[folder] = _missing_files(folder, names)
        if not missing[folder]:
            return folder
    best = min(folders, key=lambda folder: len(missing[folder]))
    if len(missing[best]) == len(names):
        raise UserError(f"{file}: none of its images, such as {names[0]}, is in {' or '.join(map(str, folders))}")
    raise UserError(
        f"{file}: {len(missing[best])} of its {len(names)} images are not in {best}, such as {missing[best][0]}; "
        "add the files or remove their rows"
    )


def _missing_files(folder: Path, names: list[str]) -> list[str]:
    paths = [os.path.join(folder, name) for name in names]
    listed = {parent: _files_in(parent) for parent in {os.path.dirname(path) for path in paths}}
    # Some file systems accept other spellings than they list, and some folders cannot be listed.
    return [
        name
        for name, path in zip(names, paths, strict=True)
        if os.path.basename(path) not in listed[os.path.dirname(path)] and not os.path.isfile(path)
    ]


def _files_in(folder: str) -> set[str]:
    """Names of the files in a folder. One listing is faster than one check per file."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):
        return set()


def _read_image(image: Row, objects: list[Row], folder: Path) -> AnnotatedImage:
    boxes = as_boxes([row["bbox"] for row in objects], image["file_name"])
    boxes[:, 2:] += boxes[:, :2]  # from width and height to right and bottom
    crowds = np.array([bool(row.get("iscrowd", 0)) for row in objects], dtype=bool)
    box_areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    areas = [row.get("area", area) for row, area in zip(objects, box_areas, strict=True)]
    segments = [row.get("segmentation") for row in objects]
    return AnnotatedImage(
        file=folder / image["file_name"],
        width=int(image["width"]),
        height=int(image["height"]),
        boxes=boxes,
        labels=np.array([int(row["category_id"]) for row in objects], dtype=np.int64),
        ignored=crowds,
        crowds=crowds,
        areas=np.array(areas, dtype=np.float64),
        segments=tuple(segments) if all(segments) else (),
    )
