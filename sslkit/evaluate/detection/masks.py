"""What a segmentation of a COCO file must be, judged without drawing it, so that half a million take seconds."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from sslkit.errors import UserError
from sslkit.evaluate.detection.annotated_image import Picture

FARTHEST = 1e6  # pixels; the memory that drawing takes grows with the length of the outline
LONGEST = 6  # characters of a compressed number: 30 bits, more than any picture has pixels


def check_masks(pictures: Iterable[Picture]) -> None:
    """Refuse what `decode_mask` could not draw, before anything is trained.

    Raises:
        UserError: An object has no segmentation, or a broken one.
    """
    for picture in pictures:
        if len(picture.boxes) and not picture.segments:
            raise UserError(f"--masks: {picture.file} has objects without a segmentation")
        for number, segment in enumerate(picture.segments, 1):
            fault = _fault_of(segment, picture.height, picture.width)
            if fault:
                raise UserError(f"--masks: the segmentation of object {number} of {picture.file} {fault}")


def _fault_of(segment: Any, height: int, width: int) -> str:
    """What is wrong and what would be right; empty if nothing is."""
    if isinstance(segment, list):
        if all(map(_is_polygon, segment)):
            return ""
        return "has a polygon that is not 6 or more numbers, x and y in turn, of at most 1e6 pixels"
    if not isinstance(segment, dict) or not {"size", "counts"} <= segment.keys():
        return "is neither a list of polygons nor run lengths with size and counts"
    if segment["size"] != [height, width]:
        return f"is for another size than its picture's, which is [{height}, {width}] (height, width)"
    lengths = _lengths_of(segment["counts"])
    if lengths is None:
        return "has counts that are neither a list of whole numbers nor COCO's compressed ones"
    if sum(lengths) != height * width or min(lengths) < 0:
        return f"has run lengths that do not add up to its picture's {height * width} pixels"
    return ""


def _is_polygon(points: Any) -> bool:
    return (
        isinstance(points, list)
        and len(points) >= 6
        and len(points) % 2 == 0
        and set(map(type, points)) <= {int, float}  # a bool is no coordinate, though Python's bool is an int
        and -FARTHEST <= min(points) <= max(points) <= FARTHEST
        and not any(map(math.isnan, points))  # which hide from min and max
    )


def _lengths_of(counts: Any) -> list[int] | None:
    if isinstance(counts, str):
        return _decompressed(counts)
    if isinstance(counts, list) and set(map(type, counts)) == {int}:
        return counts
    return None


def _decompressed(counts: str) -> list[int] | None:
    """What rleFrString of pycocotools reads, which trusts its text: beyond a broken one's end it reads on."""
    if not counts or not all("0" <= letter <= "o" for letter in counts):
        return None
    digits = np.frombuffer(counts.encode(), dtype=np.uint8).astype(np.int64) - ord("0")
    ends = np.flatnonzero(digits & 0x20 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if len(ends) == 0 or ends[-1] != len(digits) - 1 or sizes.max() > LONGEST:
        return None
    places = 5 * (np.arange(len(digits)) - np.repeat(starts, sizes))
    numbers = np.add.reduceat((digits & 0x1F) << places, starts)
    numbers -= np.where(digits[ends] & 0x10, np.int64(1) << 5 * sizes, 0)  # the sign
    # From the fourth on a number is the difference from the last but one.
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    lengths: list[int] = numbers.tolist()
    return lengths
