"""What is read where an image cannot be: another, which depends on nothing but (seed, epoch, sample, attempt)."""

from dataclasses import dataclass

import numpy as np

from sslkit.data.batch import BadSample
from sslkit.data.decode.rgb import Pixels, Reduction, Size, UnreadableImage
from sslkit.data.sources.image_source import ImageSource
from sslkit.errors import UserError
from sslkit.random_draws import DrawPurpose

ATTEMPTS = 16


@dataclass(frozen=True)
class Found:
    """An image that could be read.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, reduced if that was asked for.
        size: Height and width of the whole image.
        index: Its position in the source: another than was asked for, if that one is bad.
        bad: The images that were tried before.
    """

    pixels: Pixels
    size: Size
    index: int
    bad: tuple[BadSample, ...]


def read_or_replace(
    source: ImageSource, seed: int, epoch: int, sample: int, reduction: Reduction = lambda _size: 1
) -> Found:
    """Read image ``sample``, or the first readable one of the images drawn in its place.

    Args:
        source: Images.
        seed: The run's.
        epoch: In which the sample is due; another epoch draws other images.
        sample: Position in the source.
        reduction: See `decode_reduced`.

    Raises:
        UserError: Sixteen images in a row could not be read.
    """
    bad: list[BadSample] = []
    for attempt in range(ATTEMPTS):
        index = sample if attempt == 0 else replacement(seed, epoch, sample, attempt, len(source))
        try:
            return Found(*source.read_reduced(index, reduction), index, tuple(bad))
        except UnreadableImage as error:
            bad.append(BadSample(index, source.name(index), error.reason))
    examples = "; ".join(f"{each.name} ({each.reason})" for each in bad[:3])
    raise UserError(f"{source.description}: {ATTEMPTS} images in a row cannot be read, such as {examples}")


def replacement(seed: int, epoch: int, sample: int, attempt: int, num_samples: int) -> int:
    """The position of the image to try in place of ``sample``, uniform over the source."""
    return int(np.random.default_rng([seed, DrawPurpose.REPLACEMENT, epoch, sample, attempt]).integers(num_samples))
