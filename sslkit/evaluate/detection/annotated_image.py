"""The data class of an image and its annotated objects."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sslkit.data.decode.background import WHITE
from sslkit.data.decode.rgb import UnreadableImage, decode_rgb, read_header
from sslkit.errors import UserError

MAX_COORDINATE = 1e9  # pixels
MAX_AREA = 1e10  # square pixels; COCO's code does not score larger objects
HEADER_BYTES = 2**16  # enough for most headers


def as_boxes(rows: Sequence[Any], image: str) -> NDArray[np.float64]:
    """Convert an image's boxes to an array (N, 4). Raises ValueError if a box is not four finite numbers."""
    for row in rows:
        numbers = isinstance(row, list) and len(row) == 4 and {*map(type, row)} <= {int, float}
        if not numbers or not all(abs(number) < MAX_COORDINATE for number in row):
            raise ValueError(f"a box of {image} is {reprlib.repr(row)}, not four finite numbers")
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


@dataclass(frozen=True)
class AnnotatedImage:
    """An image with N annotated objects. Raises ValueError if its size, boxes or areas are impossible."""

    file: Path
    width: int  # in pixels
    height: int
    boxes: NDArray[np.float64]  # (N, 4): left, top, right, bottom in pixels from the top left corner
    labels: NDArray[np.int64]  # (N,) class numbers from 1; 0 is the background
    ignored: NDArray[np.bool_]  # (N,) crowds (COCO) and difficult objects (VOC): detecting them is not scored
    crowds: NDArray[np.bool_]  # (N,) annotations of several objects, which are not trained on
    areas: NDArray[np.float64]  # (N,) in square pixels, for COCO's classes of size
    segments: tuple[Any, ...] = ()  # polygons or run lengths per object, as in COCO; empty if the format has none
    background: str = WHITE  # colour behind transparent pixels; see `sslkit.data.config.DataConfig`

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"the size of {self.file.name} is {self.width} x {self.height} pixels")
        # COCO itself has boxes without area; they are not trained on.
        if (self.boxes[:, 2:] < self.boxes[:, :2]).any():
            raise ValueError(f"a box of {self.file.name} has a negative width or height")
        if not ((self.areas >= 0) & (self.areas <= MAX_AREA)).all():
            raise ValueError(f"an area of {self.file.name} is not between 0 and {MAX_AREA:g} square pixels")

    def trainable(self) -> NDArray[np.bool_]:
        """Which objects can be trained on, (N,): those with an area that are not crowds."""
        trainable: NDArray[np.bool_] = (self.boxes[:, 2:] > self.boxes[:, :2]).all(axis=1) & ~self.crowds
        return trainable

    def scored(self) -> NDArray[np.bool_]:
        """Which objects count in the score, (N,)."""
        scored: NDArray[np.bool_] = self.trainable() & ~self.ignored
        return scored

    def pixels(self) -> NDArray[np.uint8]:
        """Decode the image to (H, W, 3) RGB. Raises `UserError` if it cannot be read or has another size."""
        try:
            encoded = self.file.read_bytes()
        except OSError as error:
            raise UserError(f"{self.file}: annotated, but cannot be read ({error.strerror})") from error
        pixels = decode_rgb(encoded, str(self.file), self.background)
        if pixels.shape[:2] != (self.height, self.width):
            swapped = pixels.shape[1::-1] == (self.height, self.width) and read_header(encoded, "").orientation >= 5
            cause = "; the annotation probably ignores its EXIF rotation: annotate the rotated image or remove the tag"
            raise UserError(
                f"{self.file}: is {pixels.shape[1]} x {pixels.shape[0]} pixels, but its annotation says {self.width} x "
                f"{self.height}{cause * swapped}"
            )
        return pixels

    def check_size(self) -> None:
        """Check the annotated size. Decodes the image only if its header does not agree. Raises as `pixels` does."""
        for count in (HEADER_BYTES, -1):
            try:
                with self.file.open("rb") as stream:
                    header = read_header(stream.read(count), "")
            except (OSError, UnreadableImage):  # WebP and TIFF may need the whole file
                continue
            if header.size == (self.height, self.width):
                return
        self.pixels()  # the orientation tag of a PNG may follow its pixels
