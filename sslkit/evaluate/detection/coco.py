"""COCO's format: one JSON file a split, pictures in a folder near it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sslkit.errors import UserError
from sslkit.evaluate.detection.picture import Picture, as_boxes

EXPORTED = "_annotations.coco.json"  # the name labelling tools give the file inside a split's folder


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
        content = json.loads(split.file.read_text(encoding="utf-8"))
        names = {int(category["id"]): str(category["name"]) for category in content["categories"]}
        objects: dict[int, list[dict[str, Any]]] = {int(image["id"]): [] for image in content["images"]}
        for thing in content["annotations"]:
            if int(thing["category_id"]) not in names:
                raise ValueError(f"annotation {thing['id']} has the unknown category {thing['category_id']}")
            objects[int(thing["image_id"])].append(thing)
        folder = _folder_of(split, content["images"])
        pictures = [_read_picture(image, objects[int(image["id"])], folder) for image in content["images"]]
    except UserError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{split.file}: is not a readable COCO annotation ({missing})") from error
    return pictures, names


def _folder_of(split: Split, images: list[dict[str, Any]]) -> Path:
    if not images:
        raise ValueError("it lists no images")
    for folder in split.folders:
        if (folder / images[0]["file_name"]).is_file():
            return folder
    places = ", ".join(str(folder) for folder in split.folders)
    raise UserError(f"{split.file}: its picture {images[0]['file_name']} is in none of {places}")


def _read_picture(image: dict[str, Any], things: list[dict[str, Any]], folder: Path) -> Picture:
    corners = as_boxes([thing["bbox"] for thing in things], image["file_name"])
    corners[:, 2:] += corners[:, :2]
    crowds = np.array([bool(thing.get("iscrowd", 0)) for thing in things], dtype=bool)
    sizes = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
    drawn = [thing.get("segmentation") for thing in things]
    return Picture(
        file=folder / image["file_name"],
        width=int(image["width"]),
        height=int(image["height"]),
        boxes=corners,
        labels=np.array([int(thing["category_id"]) for thing in things], dtype=np.int64),
        ignored=crowds,
        crowds=crowds,
        areas=np.array([thing.get("area", size) for thing, size in zip(things, sizes, strict=True)], dtype=np.float64),
        segments=tuple(drawn) if all(drawn) else (),
    )
