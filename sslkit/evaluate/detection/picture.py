"""A picture and the objects in it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sslkit.data.decode import decode_rgb
from sslkit.errors import UserError

FARTHEST = 1e9  # pixels


def as_boxes(rows: Sequence[Any], picture: str) -> NDArray[np.float64]:
    """Boxes (N, 4) of a picture as its annotation has them.

    Raises:
        ValueError: One is not four finite numbers.
    """
    boxes = [np.array(row, dtype=np.float64) for row in rows]
    for box in boxes:
        if box.shape != (4,) or not (np.abs(box) < FARTHEST).all():
            raise ValueError(f"a box of {picture} is {box.tolist()}, not four finite numbers")
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


@dataclass(frozen=True)
class Picture:
    """A picture and the objects in it.

    Attributes:
        file: Where it is.
        width: In pixels.
        height: In pixels.
        boxes: (N, 4) float64: left, top, right, bottom in pixels from the top left corner of the picture.
        labels: (N,) int64, class numbers from 1; 0 is the background.
        ignored: (N,) bool: crowds (COCO) and difficult objects (VOC); finding them is neither right nor wrong.
        crowds: (N,) bool: those that are no single object, which nothing is learned from.
        areas: (N,) float64, in square pixels, for COCO's three classes of size.
        segments: One a box, polygons or run lengths as COCO has them; empty where the format has none.
    """

    file: Path
    width: int
    height: int
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    crowds: NDArray[np.bool_]
    areas: NDArray[np.float64]
    segments: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        """Refuse, by a ValueError, what no picture can have."""
        if self.width < 1 or self.height < 1:
            raise ValueError(f"{self.file.name} is said to be {self.width} x {self.height} pixels")
        if not np.isfinite(self.areas).all():
            raise ValueError(f"an area of {self.file.name} is not finite")
        # Boxes without an area do occur in COCO itself: nothing is learned from them.
        if (self.boxes[:, 2:] < self.boxes[:, :2]).any():
            raise ValueError(f"a box of {self.file.name} ends before it begins")

    def usable(self) -> NDArray[np.bool_]:
        """Which objects can be learned from: (N,) bool."""
        solid = (self.boxes[:, 2:] > self.boxes[:, :2]).all(axis=1)
        usable: NDArray[np.bool_] = solid & ~self.crowds
        return usable

    def relabelled(self, labels: NDArray[np.int64]) -> "Picture":
        """The same with other class numbers."""
        return replace(self, labels=labels)

    def pixels(self) -> NDArray[np.uint8]:
        """The picture itself, (H, W, 3) RGB.

        Raises:
            UserError: No such file, not a picture, or of another size than its annotation says.
        """
        try:
            encoded = self.file.read_bytes()
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read, but its annotation names it ({error.strerror})") from error
        pixels = decode_rgb(encoded, str(self.file))
        if pixels.shape[:2] != (self.height, self.width):
            found = f"{pixels.shape[1]} x {pixels.shape[0]}"
            raise UserError(f"{self.file}: is {found} pixels, but its annotation says {self.width} x {self.height}")
        return pixels
