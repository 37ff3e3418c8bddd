"""The random parameters of a view: where it is cropped and what is done to its colours.

They are plain numbers and a pure function of (seed, epoch, sample, view), so that views do not depend on workers, ranks
or restarts, and the CPU and an accelerator can make the same view.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sslkit.data.augment.views_config import Range, ViewPolicy
from sslkit.random_draws import DrawPurpose

ATTEMPTS = 10  # to draw a box that fits, as in torchvision
TENSORFLOW_ATTEMPTS = 100  # the same in SimCLR's code
HOLE_RATIO = (0.3, 3.3)  # width over height of an erased rectangle, as in random erasing (arXiv:1708.04896)
COLOURS, BOX = 16, 4 * ATTEMPTS  # uniform numbers that the colours and one box of a view are made of

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels
ViewKey = tuple[int, int, int, int]  # seed, epoch, sample, view


@dataclass(frozen=True, slots=True)
class ViewParams:
    """The random parameters of one view.

    ``jitter`` has the factors of brightness, contrast and saturation (1 changes nothing) and the shift of the hue, as a
    share of the circle. Where brightness is added, the first is a share of the full scale (0 changes nothing).
    """

    box: Box  # the part of the image that is cropped
    jitter: tuple[float, float, float, float] | None
    order: tuple[int, int, int, int]  # of the four jitter steps
    gray: bool
    sigma: float  # standard deviation of the blur in pixels; 0 for none
    solarize: bool  # values from 128 up are inverted
    flip: bool  # mirrored left to right
    angle: float  # rotation in degrees, counter-clockwise
    hole: Box | None  # the rectangle of the view that is set to black

    def as_row(self) -> NDArray[np.float32]:
        """All but the box as one row of 18 numbers, in the order of `Columns`."""
        jitter = (1.0, *self.jitter) if self.jitter else (0.0, 1.0, 1.0, 1.0, 0.0)
        rest = (self.gray, self.sigma, self.solarize, self.flip, self.angle, *(self.hole or (0, 0, 0, 0)))
        return np.array([*jitter, *self.order, *rest], dtype=np.float32)


class Columns:
    """The columns of `ViewParams.as_row`."""

    jittered, brightness, contrast, saturation, hue = range(5)
    order = slice(5, 9)
    gray, sigma, solarize, flip, angle = range(9, 14)
    hole = slice(14, 18)


def draw_params(policy: ViewPolicy, key: ViewKey, size: tuple[int, int]) -> ViewParams:
    """Draw the parameters of a view of an image of ``size``, its height and width in pixels."""
    seed, epoch, sample, view = key
    words = [seed, DrawPurpose.VIEWS, epoch, sample, view]
    # The same numbers from a list take NumPy three times as long.
    generator = np.random.default_rng(words if max(words) >= 2**32 else np.array(words, dtype=np.uint32))
    uniform: list[float] = generator.random(COLOURS + 2 * BOX).tolist()
    brightness, contrast, saturation = (
        between((max(1.0 - strength, 0.0), 1.0 + strength), number)
        for strength, number in zip(policy.jitter[:3], uniform[1:4], strict=True)
    )
    if policy.brightness == "add":
        brightness = policy.jitter[0] * (2.0 * uniform[1] - 1.0)
    hue = policy.jitter[3] * (2.0 * uniform[4] - 1.0)
    first, second, third, fourth = sorted(range(4), key=uniform[5:9].__getitem__)
    hole = uniform[COLOURS + BOX :] if uniform[15] < policy.erase_prob else None
    return ViewParams(
        box=_draw_crop(policy, uniform[COLOURS : COLOURS + BOX], generator, size),
        jitter=(brightness, contrast, saturation, hue) if uniform[0] < policy.jitter_prob else None,
        order=(first, second, third, fourth),
        gray=uniform[9] < policy.gray_prob,
        sigma=between(policy.blur_sigma, uniform[11]) if uniform[10] < policy.blur_prob else 0.0,
        solarize=uniform[12] < policy.solarize_prob,
        flip=uniform[13] < policy.flip_prob,
        angle=policy.rotate_degrees * (2.0 * uniform[14] - 1.0),
        hole=draw_box(hole, (policy.size, policy.size), policy.erase_scale, HOLE_RATIO) if hole else None,
    )


def _draw_crop(policy: ViewPolicy, uniform: list[float], generator: np.random.Generator, size: tuple[int, int]) -> Box:
    if policy.crop_sampler == "none":
        return 0, 0, *size
    if policy.crop_sampler == "tensorflow":
        return tensorflow_box(uniform, generator, size, policy)
    draw = draw_box if policy.crop_sampler == "torchvision" else clamped_box
    return draw(uniform, size, policy.crop_scale, policy.crop_ratio)


def draw_box(uniform: Sequence[float], size: tuple[int, int], scale: Range, ratio: Range) -> Box:
    """A box within ``size`` (height, width), as torchvision's RandomResizedCrop draws it.

    Its share of the area is uniform over ``scale``, its width over its height log-uniform over ``ratio``. A box that
    does not fit is drawn again; if none of `ATTEMPTS` fits, it is the largest central box with an allowed ratio.
    """
    height, width = size
    for start in range(0, BOX, 4):
        share, shape, down, right = uniform[start : start + 4]
        tall, wide = _sides(height * width * between(scale, share), shape, ratio)
        if 0 < tall <= height and 0 < wide <= width:
            return int(down * (height - tall + 1)), int(right * (width - wide + 1)), tall, wide
    tall = min(height, max(round(width / ratio[0]), 1))
    wide = min(width, max(round(height * ratio[1]), 1))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def clamped_box(uniform: Sequence[float], size: tuple[int, int], scale: Range, ratio: Range) -> Box:
    """A box within ``size``, as BYOL's code draws it: the first attempt of `draw_box`, cut to the image's sides."""
    height, width = size
    share, shape, down, right = uniform[:4]
    tall, wide = _sides(height * width * between(scale, share), shape, ratio)
    tall, wide = min(max(tall, 1), height), min(max(wide, 1), width)
    return int(down * (height - tall + 1)), int(right * (width - wide + 1)), tall, wide


def _sides(area: float, shape: float, ratio: Range) -> tuple[int, int]:
    """Height and width of a box of ``area``, its width over its height log-uniform over ``ratio``."""
    aspect = math.exp(between((math.log(ratio[0]), math.log(ratio[1])), shape))
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


def tensorflow_box(
    uniform: Sequence[float], generator: np.random.Generator, size: tuple[int, int], policy: ViewPolicy
) -> Box:
    """A box within ``size`` (height, width), as `tf.image.sample_distorted_bounding_box` draws it around all of it.

    Width over height is uniform over ``crop_ratio``. The height is a whole number, uniform between the least and the
    largest with which the box keeps to ``crop_scale`` and fits. A box outside ``crop_scale`` by more than one row, or
    with less than ``min_object_covered`` of the area, is drawn again; after `TENSORFLOW_ATTEMPTS`, the box is the whole
    image. As in TensorFlow, a box that is smaller than the image never touches its lower or right edge. ``uniform`` has
    4 `ATTEMPTS` numbers; ``generator`` gives those of further attempts.
    """
    height, width = size
    least, most = (bound * height * width for bound in policy.crop_scale)
    covered = policy.min_object_covered * height * width
    for attempt in range(TENSORFLOW_ATTEMPTS):
        if attempt == ATTEMPTS:
            uniform = [*uniform, *generator.random(4 * (TENSORFLOW_ATTEMPTS - ATTEMPTS)).tolist()]
        shape, length, down, right = uniform[4 * attempt : 4 * attempt + 4]
        aspect = between(policy.crop_ratio, shape)
        tallest = min(round(math.sqrt(most / aspect)), int((width + 0.5) / aspect), height)
        shortest = min(round(math.sqrt(least / aspect)), tallest)
        tall = shortest + int(length * (tallest - shortest + 1))
        if tall * round(tall * aspect) < least:
            tall += 1
        if tall * round(tall * aspect) > most:
            tall -= 1
        wide = round(tall * aspect)
        fits = 0 < tall <= height and 0 < wide <= width
        if fits and max(least, covered) <= tall * wide <= most:
            return int(down * (height - tall)), int(right * (width - wide)), tall, wide
    return 0, 0, height, width


def between(bounds: Range, share: float) -> float:
    """The number at ``share`` of the way from the lower bound to the upper."""
    return bounds[0] + share * (bounds[1] - bounds[0])
