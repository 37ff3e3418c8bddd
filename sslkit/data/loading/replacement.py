"""Replacements of unreadable images. A replacement depends on the seed, the epoch, the sample and the attempt only."""

from dataclasses import dataclass

import numpy as np

from sslkit.data.batch import BadSample
from sslkit.data.decode.rgb import Pixels, Reduction, Size, UnreadableImage
from sslkit.data.sources.image_source import ImageSource
from sslkit.errors import UserError
from sslkit.random_draws import DrawPurpose

ATTEMPTS = 16


@dataclass(frozen=True)
class LoadedImage:
    """A decoded image."""

    pixels: Pixels  # (H, W, 3) uint8 RGB, reduced if requested, or (H, W, channels) uint16
    size: Size  # of the full image
    index: int  # position in the source; not the requested one if that image is unreadable
    bad: tuple[BadSample, ...]  # the unreadable images that were tried before


def read_or_replace(
    source: ImageSource, seed: int, epoch: int, sample: int, reduction: Reduction = lambda _size: 1
) -> LoadedImage:
    """Read image ``sample``, or else the first readable one of its random replacements, which differ between epochs.

    ``reduction`` is that of `decode_reduced`. Raises `UserError` if `ATTEMPTS` images in a row could not be read.
    """
    bad, index = list[BadSample](), sample
    for attempt in range(ATTEMPTS):
        if attempt:
            generator = np.random.default_rng([seed, DrawPurpose.REPLACEMENT, epoch, sample, attempt])
            index = int(generator.integers(len(source)))
        try:
            return LoadedImage(*source.decode(*source.encoded(index), reduction), index, tuple(bad))
        except UnreadableImage as error:
            bad.append(BadSample(index, source.name(index), error.reason))
    examples = "; ".join(f"{each.name} ({each.reason})" for each in bad[:3])
    raise UserError(f"{source.description}: {ATTEMPTS} images in a row cannot be read, such as {examples}")
