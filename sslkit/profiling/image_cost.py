"""The time that one core needs to read and decode an image and to make its views."""

import math
import time
from dataclasses import dataclass
from functools import partial

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.sources.image_source import ImageSource

MAX_IMAGES = 512
KEYS = ("read", "decode", "views", "crops", "pixels")


@dataclass(frozen=True)
class ImageCosts:
    """Seconds of one core for one image, averaged over ``images`` images."""

    images: int
    read: float  # of the file, or the row of the table
    decode: float  # to pixels
    views: float  # all views, on the CPU
    crops: float  # the crops alone, which remain on the CPU if an accelerator changes the colours
    pixels: float  # of an image
    unreadable: int = 0  # further images that could not be read

    @property
    def seconds(self) -> float:
        """Seconds that a data worker spends on an image."""
        return self.read + self.decode + self.views


def image_costs(source: ImageSource, pipeline: ViewPipeline, seconds: float) -> ImageCosts:
    """Measure images spread over a source, one after the other, for about ``seconds``.

    Unreadable images are left out; if all are unreadable, raise the last `UnreadableImage`.
    """
    found: list[ImageCosts] = []
    bad: list[UnreadableImage] = []
    deadline = time.perf_counter() + seconds
    for sample in [0, *range(0, len(source), math.ceil(len(source) / MAX_IMAGES))]:
        if len(found) > 1 and time.perf_counter() > deadline:
            break
        try:
            found.append(_cost(source, pipeline, sample))
        except UnreadableImage as error:
            bad.append(error)
    warm = found[1:]  # the first image also loads modules
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
