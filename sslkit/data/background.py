"""What stands behind transparent pixels: a colour, or nothing, so that the colours under them show."""

from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageColor

KEEP = "keep"  # drop alpha and keep the colours under it
WHITE = "white"


@cache
def colour_of(background: str) -> NDArray[np.uint16]:
    """The colour that a ``background`` names, (3,) in 0 to 255.

    Args:
        background: As CSS writes colours: ``"white"``, ``"#8090a0"``, ``"rgb(128, 144, 160)"``.

    Raises:
        ValueError: It names none.
    """
    colour: tuple[int, ...] = ()
    with suppress(ValueError):
        colour = ImageColor.getrgb(background)
    if len(colour) != 3:
        raise ValueError(f'must be "{KEEP}" or a colour such as "white", "black" or "#8090a0"')
    return np.array(colour, dtype=np.uint16)


def check_background(background: str) -> str:
    """Return ``background`` if it is `KEEP` or a colour.

    Raises:
        ValueError: It is neither.
    """
    if background != KEEP:
        colour_of(background)
    return background


def flatten(pixels: NDArray[np.uint8], background: str) -> NDArray[Any]:
    """Composite (H, W, 4) uint8 RGBA over a colour, or drop its alpha: (H, W, 3) uint8 RGB.

    Pixels without transparency come out as they are.
    """
    colours, alpha = pixels[..., :3], pixels[..., 3:]
    if background == KEEP or alpha.min() == 255:
        return np.ascontiguousarray(colours)
    mixed = colours * alpha.astype(np.uint16) + colour_of(background) * (255 - alpha)  # at most 255 * 255
    mixed += 127
    mixed //= 255
    return mixed.astype(np.uint8)


def describe_background(background: str) -> str:
    """What happens to alpha, in words for print."""
    if background == KEEP:
        return 'alpha is dropped and the colours under it are kept ([data] background = "keep")'
    return f'composited over {background} ([data] background = "{background}")'
