"""Checks of segmentations in a COCO file, without drawing them: half a million take seconds."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from sslkit.errors import UserError
from sslkit.evaluate.detection.annotated_image import AnnotatedImage

MAX_COORDINATE = 1e6  # pixels; the memory for drawing a polygon grows with its perimeter
MAX_CHARACTERS = 6  # of a compressed number: 30 bits


def check_masks(images: Iterable[AnnotatedImage]) -> None:
    """Raise `UserError` if an object has no segmentation, or one that `decode_mask` cannot draw."""
    for image in images:
        if len(image.boxes) and not image.segments:
            raise UserError(f"--masks: {image.file} has objects without a segmentation")
        for number, segment in enumerate(image.segments, 1):
            if problem := _problem(segment, image.height, image.width):
                raise UserError(f"--masks: the segmentation of object {number} of {image.file} {problem}")


def _problem(segment: Any, height: int, width: int) -> str:
    """What is wrong with a segmentation and what would be right; empty if nothing is."""
    if isinstance(segment, list):
        if all(map(_is_polygon, segment)):
            return ""
        return "has a polygon that is not a list of 6 or more alternating x and y values of at most 1e6 pixels"
    if not isinstance(segment, dict) or not {"size", "counts"} <= segment.keys():
        return "is neither a list of polygons nor run lengths with size and counts"
    if segment["size"] != [height, width]:
        return f"has another size than its image, which is [{height}, {width}] (height, width)"
    counts = segment["counts"]
    lengths = _decompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(lengths, list) or set(map(type, lengths)) != {int}:
        return "has counts that are neither a list of integers nor COCO's compressed string"
    if sum(lengths) != height * width or min(lengths) < 0:
        return f"has run lengths that do not add up to the {height * width} pixels of its image"
    return ""


def _is_polygon(points: Any) -> bool:
    return (
        isinstance(points, list)
        and len(points) >= 6
        and len(points) % 2 == 0
        and set(map(type, points)) <= {int, float}  # excludes bool, a subclass of int
        and -MAX_COORDINATE <= min(points) <= max(points) <= MAX_COORDINATE
        and not any(map(math.isnan, points))  # min and max may ignore NaN
    )


def _decompressed(counts: str) -> list[int] | None:
    """The same as rleFrString of pycocotools, which reads beyond the end of an invalid string."""
    if not counts or not all("0" <= letter <= "o" for letter in counts):
        return None
    digits = np.frombuffer(counts.encode(), dtype=np.uint8).astype(np.int64) - ord("0")
    ends = np.flatnonzero(digits & 0x20 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if len(ends) == 0 or ends[-1] != len(digits) - 1 or sizes.max() > MAX_CHARACTERS:
        return None
    shifts = 5 * (np.arange(len(digits)) - np.repeat(starts, sizes))
    numbers = np.add.reduceat((digits & 0x1F) << shifts, starts)
    numbers -= np.where(digits[ends] & 0x10, np.int64(1) << 5 * sizes, 0)  # the sign
    # From the fourth on, numbers are differences from the last but one.
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    lengths: list[int] = numbers.tolist()
    return lengths
