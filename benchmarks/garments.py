"""Render a small detection dataset: bundled garments at random places and sizes on a noisy background.

    python benchmarks/garments.py FOLDER [--format coco] [--train 400] [--test 100] [--side 128] [--classes 10]

Boxes and masks are exact: garments do not overlap, and a garment covers the non-black pixels of its image.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sslkit.data.sources.image_source import DataConfig, ImageSource, open_source

BLACK = 24
GROUND = 90


@dataclass(frozen=True)
class Garment:
    """One garment of a scene: class, (H, W) mask in the scene, and the mask's left, top, right, bottom."""

    name: str
    mask: NDArray[np.bool_]
    box: tuple[int, int, int, int]


def render_scene(
    source: ImageSource, labels: list[str], rng: np.random.Generator, side: int
) -> tuple[NDArray[np.uint8], list[Garment]]:
    """Render an image of ``side`` x 1.25 ``side`` pixels with one to four garments."""
    height, width = side, side * 5 // 4
    coarse = rng.uniform(0, GROUND, (side // 8, side // 8)).astype(np.float32)
    scene = np.clip(cv2.resize(coarse, (width, height)) + rng.normal(0, 6, (height, width)), 0, 255).astype(np.uint8)
    taken = np.zeros((height, width), dtype=bool)
    garments: list[Garment] = []
    for _ in range(rng.integers(1, 5)):
        index = int(rng.integers(len(source)))
        size = round(28 * side / 128 * rng.uniform(0.9, 2.0))
        garment = cv2.resize(source.read(index)[:, :, 0], (size, size), interpolation=cv2.INTER_LINEAR)
        top, left = int(rng.integers(height - size)), int(rng.integers(width - size))
        window = (slice(top, top + size), slice(left, left + size))
        shown = garment > BLACK
        if taken[window].any() or not shown.any():
            continue
        taken[window] = True
        scene[window][shown] = garment[shown]
        mask = np.zeros_like(taken)
        mask[window] = shown
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        garments.append(Garment(labels[index], mask, box))
    return np.repeat(scene[:, :, None], 3, axis=2), garments


def render(
    folder: Path, layout: str, counts: dict[str, int], side: int = 128, seed: int = 0, classes: int = 10
) -> None:
    """Write a dataset.

    Args:
        folder: Target folder.
        layout: ``voc`` or ``coco``.
        counts: Number of images per split. ``train`` and the others show different garments.
        side: Height in pixels.
        seed: Seed of the scenes.
        classes: Number of garment classes.
    """
    for number, (split, count) in enumerate(counts.items()):
        half = "train" if split == "train" else "test"
        source = open_source(DataConfig(path="builtin:fashion_mnist", split=half))
        known = sorted(set(source.labels()))[:classes]
        source = source.subset(np.array([place for place, label in enumerate(source.labels()) if label in known]))
        labels, rng = source.labels(), np.random.default_rng([seed, number])
        scenes = [render_scene(source, labels, rng, side) for _ in range(count)]
        (_write_voc if layout == "voc" else _write_coco)(folder, split, scenes, known)


def _write_voc(folder: Path, split: str, scenes: list[Any], _classes: list[str]) -> None:
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = [f"{split}{number:05d}" for number in range(len(scenes))]
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    for name, (scene, garments) in zip(names, scenes, strict=True):
        Image.fromarray(scene).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        root = ElementTree.Element("annotation")
        size = ElementTree.SubElement(root, "size")
        for word, value in zip(("height", "width", "depth"), scene.shape, strict=True):
            ElementTree.SubElement(size, word).text = str(value)
        for garment in garments:
            thing = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(thing, "name").text = garment.name
            ElementTree.SubElement(thing, "difficult").text = "0"
            left, top, right, bottom = garment.box
            corners = ElementTree.SubElement(thing, "bndbox")
            # VOC counts pixels from 1 and includes both ends.
            edges = {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom}
            for word, value in edges.items():
                ElementTree.SubElement(corners, word).text = str(value)
        ElementTree.ElementTree(root).write(folder / "Annotations" / f"{name}.xml")


def _write_coco(folder: Path, split: str, scenes: list[Any], classes: list[str]) -> None:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / split).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    numbers = {name: 3 * place + 1 for place, name in enumerate(classes)}  # with gaps, as in COCO
    for number, (scene, garments) in enumerate(scenes):
        name = f"{number:012d}.png"
        Image.fromarray(scene).save(folder / split / name)
        images.append({"id": number, "file_name": name, "height": scene.shape[0], "width": scene.shape[1]})
        for garment in garments:
            left, top, right, bottom = garment.box
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": numbers[garment.name],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(garment.mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": list(garment.mask.shape), "counts": _run_lengths(garment.mask)},
                }
            )
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Alternating lengths of runs of zeros and ones, in column order, zeros first."""
    column = mask.T.ravel()
    ends = [*(np.flatnonzero(np.diff(column)) + 1).tolist(), len(column)]
    lengths = np.diff([0, *ends]).tolist()
    return [0, *lengths] if column[0] else lengths


def main() -> None:
    """Parse and render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", choices=("voc", "coco"), default="coco")
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--classes", type=int, default=10, help="number of garment classes")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    counts = {"train": words.train, "test": words.test}
    render(words.folder, words.format, counts, words.side, words.seed, words.classes)


if __name__ == "__main__":
    main()
