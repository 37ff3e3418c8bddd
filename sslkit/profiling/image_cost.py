"""What one image costs one core before it is a part of a batch."""

import math
import time
from dataclasses import dataclass
from functools import partial

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.sources.image_source import ImageSource

MOST = 512  # images looked at
KEYS = ("read", "decode", "views", "crops", "pixels")


@dataclass(frozen=True)
class ImageCosts:
    """Seconds of one core for one image, on the average of ``images``.

    Attributes:
        images: How many were looked at.
        read: From the disk, or the table.
        decode: To pixels.
        views: All of its views, as the recipe has them cut by the CPU.
        crops: The part of it that is left to the CPU where an accelerator changes the colours.
        pixels: Of the whole image.
        unreadable: How many more were looked at and could not be read.
    """

    images: int
    read: float
    decode: float
    views: float
    crops: float
    pixels: float
    unreadable: int = 0

    @property
    def seconds(self) -> float:
        """All that a data worker does for an image."""
        return self.read + self.decode + self.views


def image_costs(source: ImageSource, pipeline: ViewPipeline, seconds: float) -> ImageCosts:
    """Time images spread over ``source``, one after the other, for about so many seconds; unreadable ones are left out.

    Raises:
        UnreadableImage: None of those tried can be read.
    """
    found: list[ImageCosts] = []
    bad: list[UnreadableImage] = []
    deadline = time.perf_counter() + seconds
    for sample in [0, *range(0, len(source), math.ceil(len(source) / MOST))]:
        if len(found) > 1 and time.perf_counter() > deadline:
            break
        try:
            found.append(_cost(source, pipeline, sample))
        except UnreadableImage as error:
            bad.append(error)
    warm = found[1:]  # the first one pays for what is loaded late
    if not warm:
        raise bad[-1]
    means = {key: sum(getattr(each, key) for each in warm) / len(warm) for key in KEYS}
    return ImageCosts(len(warm), unreadable=len(bad), **means)


def _cost(source: ImageSource, pipeline: ViewPipeline, sample: int) -> ImageCosts:
    started = time.perf_counter()
    name, encoded = source.encoded(sample)
    read = time.perf_counter()
    pixels, size = source.decode(name, encoded, partial(pipeline.reduction, 0, sample))
    decoded = time.perf_counter()
    pipeline.crop_views(pixels, 0, sample, size)
    cropped = time.perf_counter()
    crops = views = cropped - decoded
    if pipeline.config.device == "cpu":
        pipeline(pixels, 0, sample, size)
        views = time.perf_counter() - cropped
    return ImageCosts(1, read - started, decoded - read, views, crops, size[0] * size[1])
