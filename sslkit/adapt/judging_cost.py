"""What it takes to judge an encoder at an input size, and whether it fits into the time."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sslkit.files.atomic import replace_text

FILE = "seconds.json"


class JudgingCost:
    """Seconds for an image at each input size.

    They are remembered in the folder, so that features that are loaded from it do not seem to cost nothing, and the
    same command judges the same sizes again.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self.of_image: dict[int, float] = {}
        try:
            found = json.loads(self.file.read_text())
            self.of_image = {int(size): float(seconds) for size, seconds in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            self.of_image = {}  # a damaged file counts as missing

    @contextmanager
    def measuring(self, size: int, images: int) -> Iterator[None]:
        """Measure what the block takes for a number of images, unless it is known."""
        begin = time.monotonic()
        yield
        if size not in self.of_image:
            self.of_image[size] = (time.monotonic() - begin) / images
            with suppress(OSError):  # the disk is full or read-only; training says so
                replace_text(self.file, json.dumps({str(each): value for each, value in self.of_image.items()}) + "\n")

    def expected(self, size: int, images: int) -> float:
        """Seconds for a number of images at a size; of a new size, from the next smaller one by the number of pixels.

        0 if no size is known.
        """
        if size in self.of_image or not self.of_image:
            return self.of_image.get(size, 0.0) * images
        known = max((each for each in self.of_image if each < size), default=min(self.of_image))
        return self.of_image[known] * (size / known) ** 2 * images
