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
    """A decoded image.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, reduced if requested, or (H, W, channels) uint16.
        size: Height and width of the full image.
        index: Position in the source; not the requested one if that image is unreadable.
        bad: The unreadable images that were tried before.
    """

    pixels: Pixels
    size: Size
    index: int
    bad: tuple[BadSample, ...]


def read_or_replace(
    source: ImageSource, seed: int, epoch: int, sample: int, reduction: Reduction = lambda _size: 1
) -> LoadedImage:
    """Read image ``sample``, or else the first readable one of its random replacements.

    Args:
        source: The images.
        seed: Seed of the run.
        epoch: Epoch in which the sample is used; replacements differ between epochs.
        sample: Position in the source.
        reduction: See `decode_reduced`.

    Raises:
        UserError: `ATTEMPTS` images in a row could not be read.
    """
    bad: list[BadSample] = []
    for attempt in range(ATTEMPTS):
        index = sample if attempt == 0 else replacement(seed, epoch, sample, attempt, len(source))
        try:
            return LoadedImage(*source.decode(*source.encoded(index), reduction), index, tuple(bad))
        except UnreadableImage as error:
            bad.append(BadSample(index, source.name(index), error.reason))
    examples = "; ".join(f"{each.name} ({each.reason})" for each in bad[:3])
    raise UserError(f"{source.description}: {ATTEMPTS} images in a row cannot be read, such as {examples}")


def replacement(seed: int, epoch: int, sample: int, attempt: int, num_samples: int) -> int:
    """Position of the image to try in place of ``sample``, uniformly distributed."""
    return int(np.random.default_rng([seed, DrawPurpose.REPLACEMENT, epoch, sample, attempt]).integers(num_samples))
