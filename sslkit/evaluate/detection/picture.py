"""A picture and the objects in it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sslkit.data.decode import decode_rgb
from sslkit.errors import UserError


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
