"""What chance decides of a view, before a pixel is touched: where it is cut and what is done to its colours.

A draw is plain numbers and a pure function of (seed, epoch, sample, view), so that views do not depend on workers,
ranks or restarts, a processor and an accelerator can make the same view, and a test can count what was drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sslkit.data.augment.policies import LARGE_VIEWS, PerView, Range, ViewsConfig
from sslkit.random_draws import DrawPurpose

ATTEMPTS = 10  # at a box that fits, as torchvision has them
TENSORFLOW_ATTEMPTS = 100  # the same in SimCLR's code
HOLE_RATIO = (0.3, 3.3)  # of a blanked rectangle, as in random erasing (arXiv:1708.04896)
SPREAD = 3.5  # standard deviations at which a blur's kernel ends, as albumentations has it; none below sigma 2/7
COLOURS, BOX = 16, 4 * ATTEMPTS  # uniform numbers that a view's colours and one box are made of

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels


@dataclass(frozen=True, slots=True)
class Draw:
    """One view's draw.

    Attributes:
        box: What is cut out of the image.
        jitter: Factors of brightness, contrast and saturation (1 changes nothing) and the turn of the hue, in shares
            of the circle; None for a view whose colours are left alone. Where brightness is added, the first is a share
            of the full scale (0 changes nothing).
        order: In which order these four are applied.
        gray: Whether the view turns grey.
        sigma: Standard deviation of the blur in pixels; 0 for none.
        solarize: Whether values from 128 up are inverted.
        flip: Whether left and right change places.
        angle: Degrees of rotation, counter-clockwise.
        hole: What is blanked of the view; None for nothing.
    """

    box: Box
    jitter: tuple[float, float, float, float] | None
    order: tuple[int, int, int, int]
    gray: bool
    sigma: float
    solarize: bool
    flip: bool
    angle: float
    hole: Box | None

    def numbers(self) -> NDArray[np.float32]:
        """All but the box as one row of numbers, in the order of `Columns`."""
        jitter = (1.0, *self.jitter) if self.jitter else (0.0, 1.0, 1.0, 1.0, 0.0)
        rest = (self.gray, self.sigma, self.solarize, self.flip, self.angle, *(self.hole or (0, 0, 0, 0)))
        return np.array([*jitter, *self.order, *rest], dtype=np.float32)


class Columns:
    """Where `Draw.numbers` keeps what."""

    jittered, brightness, contrast, saturation, hue = range(5)
    order = slice(5, 9)
    gray, sigma, solarize, flip, angle = range(9, 14)
    hole = slice(14, 18)


def draw_view(config: ViewsConfig, seed: int, epoch: int, sample: int, view: int, size: tuple[int, int]) -> Draw:
    """Draw view ``view`` of an image of ``size`` (height, width) pixels."""
    generator = np.random.default_rng([seed, DrawPurpose.VIEWS, epoch, sample, view])
    uniform: list[float] = generator.random(COLOURS + 2 * BOX).tolist()
    small = view >= LARGE_VIEWS
    side, scale = (config.small_size, config.small_scale) if small else (config.size, config.crop_scale)

    def happens(probability: PerView, number: float) -> bool:
        return number < (probability[min(view, 1)] if isinstance(probability, tuple) else probability)

    brightness, contrast, saturation = (
        between((max(1.0 - strength, 0.0), 1.0 + strength), number)
        for strength, number in zip(config.jitter[:3], uniform[1:4], strict=True)
    )
    if config.brightness == "add":
        brightness = config.jitter[0] * (2.0 * uniform[1] - 1.0)
    hue = config.jitter[3] * (2.0 * uniform[4] - 1.0)
    first, second, third, fourth = sorted(range(4), key=uniform[5:9].__getitem__)
    hole = uniform[COLOURS + BOX :] if happens(config.erase_prob, uniform[15]) else None
    numbers = uniform[COLOURS : COLOURS + BOX]
    if config.crop_sampler == "torchvision":
        box = draw_box(numbers, size, scale, config.crop_ratio)
    elif config.crop_sampler == "clamped":
        box = clamped_box(numbers, size, scale, config.crop_ratio)
    else:
        covered = 0.0 if small else config.min_object_covered
        box = tensorflow_box(numbers, generator, size, scale, config.crop_ratio, covered)
    return Draw(
        box=box,
        jitter=(brightness, contrast, saturation, hue) if happens(config.jitter_prob, uniform[0]) else None,
        order=(first, second, third, fourth),
        gray=happens(config.gray_prob, uniform[9]),
        sigma=between(config.blur_sigma, uniform[11]) if happens(config.blur_prob, uniform[10]) else 0.0,
        solarize=happens(config.solarize_prob, uniform[12]),
        flip=happens(config.flip_prob, uniform[13]),
        angle=config.rotate_degrees * (2.0 * uniform[14] - 1.0),
        hole=draw_box(hole, (side, side), config.erase_scale, HOLE_RATIO) if hole else None,
    )


def draw_box(uniform: Sequence[float], size: tuple[int, int], scale: Range, ratio: Range) -> Box:
    """A box within ``size`` (height, width), as torchvision's RandomResizedCrop draws it.

    Its share of the area is uniform over ``scale``, its width over its height log-uniform over ``ratio``. A box that
    does not fit is drawn again; if none of `ATTEMPTS` fits, it is the largest in the middle whose ratio is allowed.

    Args:
        uniform: 4 `ATTEMPTS` numbers in [0, 1).
        size: Of what the box is cut out of.
        scale: Shares of the area.
        ratio: Widths over heights.
    """
    height, width = size
    logs = (math.log(ratio[0]), math.log(ratio[1]))
    for start in range(0, BOX, 4):
        share, shape, down, right = uniform[start : start + 4]
        area, aspect = height * width * between(scale, share), math.exp(between(logs, shape))
        tall, wide = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < tall <= height and 0 < wide <= width:
            return int(down * (height - tall + 1)), int(right * (width - wide + 1)), tall, wide
    tall = min(height, max(round(width / ratio[0]), 1))
    wide = min(width, max(round(height * ratio[1]), 1))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def clamped_box(uniform: Sequence[float], size: tuple[int, int], scale: Range, ratio: Range) -> Box:
    """A box within ``size`` (height, width), as BYOL's code draws it: `draw_box`'s first attempt, each side at most
    the image's.

    Args:
        uniform: 4 numbers in [0, 1), or more.
        size: Of what the box is cut out of.
        scale: Shares of the area.
        ratio: Widths over heights.
    """
    height, width = size
    share, shape, down, right = uniform[:4]
    area = height * width * between(scale, share)
    aspect = math.exp(between((math.log(ratio[0]), math.log(ratio[1])), shape))
    tall = min(max(round(math.sqrt(area / aspect)), 1), height)
    wide = min(max(round(math.sqrt(area * aspect)), 1), width)
    return int(down * (height - tall + 1)), int(right * (width - wide + 1)), tall, wide


def tensorflow_box(
    uniform: Sequence[float],
    generator: np.random.Generator,
    size: tuple[int, int],
    scale: Range,
    ratio: Range,
    covered: float,
) -> Box:
    """A box within ``size`` (height, width), as `tf.image.sample_distorted_bounding_box` draws it around all of it.

    Its width over its height is uniform over ``ratio``; its height is a whole number, uniform between the least and the
    largest with which the box keeps to ``scale`` and fits. A box that is out of ``scale`` by more than one row, or has
    less than ``covered`` of the area, is drawn again; after `TENSORFLOW_ATTEMPTS` it is the whole image. As in
    TensorFlow, a box that is smaller than the image never touches its lower or right edge.

    Args:
        uniform: 4 `ATTEMPTS` numbers in [0, 1).
        generator: Gives the numbers of further attempts.
        size: Of what the box is cut out of.
        scale: Shares of the area.
        ratio: Widths over heights.
        covered: Least share of the area.
    """
    height, width = size
    least, most = (bound * height * width for bound in scale)
    for attempt in range(TENSORFLOW_ATTEMPTS):
        if attempt == ATTEMPTS:
            uniform = [*uniform, *generator.random(4 * (TENSORFLOW_ATTEMPTS - ATTEMPTS)).tolist()]
        shape, length, down, right = uniform[4 * attempt : 4 * attempt + 4]
        aspect = between(ratio, shape)
        tallest = min(round(math.sqrt(most / aspect)), int((width + 0.5) / aspect), height)
        shortest = min(round(math.sqrt(least / aspect)), tallest)
        tall = shortest + int(length * (tallest - shortest + 1))
        if tall * round(tall * aspect) < least:
            tall += 1
        if tall * round(tall * aspect) > most:
            tall -= 1
        wide = round(tall * aspect)
        fits = 0 < tall <= height and 0 < wide <= width
        if fits and max(least, covered * height * width) <= tall * wide <= most:
            return int(down * (height - tall)), int(right * (width - wide)), tall, wide
    return 0, 0, height, width


def between(bounds: Range, share: float) -> float:
    """The number at ``share`` of the way from the lower bound to the upper."""
    return bounds[0] + share * (bounds[1] - bounds[0])
