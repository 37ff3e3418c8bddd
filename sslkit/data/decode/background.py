"""The colour that transparent pixels are composited over."""

from contextlib import suppress
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

KEEP = "keep"  # drop alpha and keep the colours under it
WHITE = "white"


@cache
def colour_of(background: str) -> tuple[int, int, int]:
    """Red, green and blue of a ``background``, each 0 to 255.

    Args:
        background: A CSS colour, such as ``"white"``, ``"#8090a0"`` or ``"rgb(128, 144, 160)"``.

    Raises:
        ValueError: It is no colour.
    """
    colour: tuple[int, ...] = ()
    with suppress(ValueError):
        colour = ImageColor.getrgb(background)
    if len(colour) != 3:
        raise ValueError(f'must be "{KEEP}" or a colour such as "white", "black" or "#8090a0"')
    red, green, blue = colour
    return red, green, blue


def check_background(background: str) -> str:
    """Return ``background`` if it is `KEEP` or a colour.

    Raises:
        ValueError: It is neither.
    """
    if background != KEEP:
        colour_of(background)
    return background


def flatten(pixels: NDArray[np.uint8], background: str) -> NDArray[np.uint8]:
    """Composite (H, W, 4) RGBA over a colour, or drop its alpha: (H, W, 3) RGB.

    Opaque pixels are unchanged.
    """
    colours = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), dtype=np.uint8)
    if background == KEEP or pixels[..., 3].min() == 255:
        return colours
    flat = Image.new("RGB", pixels.shape[1::-1], colour_of(background))
    flat.paste(Image.fromarray(colours), mask=Image.fromarray(np.ascontiguousarray(pixels[..., 3])))
    return np.asarray(flat)


def describe_background(background: str) -> str:
    """What happens to alpha, for messages."""
    if background == KEEP:
        return 'alpha is dropped and the colours under it are kept ([data] background = "keep")'
    return f'composited over {background} ([data] background = "{background}")'
