"""A picture and the objects in it."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sslkit.data.decode.background import WHITE
from sslkit.data.decode.rgb import Header, UnreadableImage, decode_rgb, read_header
from sslkit.errors import UserError

FARTHEST = 1e9  # pixels
LARGEST = 1e10  # square pixels: COCO's code leaves out of the score what is larger, or smaller than nothing
HEADER = 2**16  # bytes that mostly hold a header


def as_boxes(rows: Sequence[Any], picture: str) -> NDArray[np.float64]:
    """Boxes (N, 4) of a picture as its annotation has them.

    Raises:
        ValueError: One is not four finite numbers.
    """
    for row in rows:
        numbers = isinstance(row, list) and len(row) == 4 and {*map(type, row)} <= {int, float}
        if not numbers or not all(abs(number) < FARTHEST for number in row):
            raise ValueError(f"a box of {picture} is {reprlib.repr(row)}, not four finite numbers")
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


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
        background: What transparent pixels are composited over; see `sslkit.data.DataConfig`.
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
    background: str = WHITE

    def __post_init__(self) -> None:
        """Refuse, by a ValueError, what no picture can have."""
        if self.width < 1 or self.height < 1:
            raise ValueError(f"{self.file.name} is said to be {self.width} x {self.height} pixels")
        # Boxes without an area do occur in COCO itself: nothing is learned from them.
        if (self.boxes[:, 2:] < self.boxes[:, :2]).any():
            raise ValueError(f"a box of {self.file.name} ends before it begins")
        if not ((self.areas >= 0) & (self.areas <= LARGEST)).all():
            raise ValueError(f"an area of {self.file.name} does not lie within 0 and {LARGEST:g} square pixels")

    def usable(self) -> NDArray[np.bool_]:
        """Which objects can be learned from: (N,) bool."""
        solid = (self.boxes[:, 2:] > self.boxes[:, :2]).all(axis=1)
        usable: NDArray[np.bool_] = solid & ~self.crowds
        return usable

    def counted(self) -> NDArray[np.bool_]:
        """Which of these objects the score counts as found or missed: (N,) bool."""
        counted: NDArray[np.bool_] = self.usable() & ~self.ignored
        return counted

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
        pixels = decode_rgb(encoded, str(self.file), self.background)
        if pixels.shape[:2] != (self.height, self.width):
            found = f"{pixels.shape[1]} x {pixels.shape[0]}"
            turned = pixels.shape[1::-1] == (self.height, self.width) and _is_turned(read_header(encoded, ""))
            cause = ", probably made without its EXIF rotation: annotate it upright, or take the tag away" * turned
            raise UserError(
                f"{self.file}: is {found} pixels, but its annotation says {self.width} x {self.height}{cause}"
            )
        return pixels

    def check_size(self) -> None:
        """Raise what `pixels` would, without decoding a picture whose header agrees with its annotation."""
        for count in (HEADER, -1):
            try:
                with self.file.open("rb") as stream:
                    header = read_header(stream.read(count), "")
            except (OSError, UnreadableImage):  # WebP and TIFF may need all of it
                continue
            if header.size == (self.height, self.width):
                return
        self.pixels()  # it has the last word: a PNG's tag may stand behind the pixels


def _is_turned(header: Header) -> bool:
    return header.orientation >= 5
