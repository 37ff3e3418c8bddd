"""The colour that transparent pixels are composited over."""

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

KEEP = "keep"  # drop alpha and keep the colours under it
WHITE = "white"


def check_background(background: str) -> str:
    """Return ``background``, which must be `KEEP` or a CSS colour such as ``"white"``; else raise `ValueError`."""
    try:
        valid = background == KEEP or len(ImageColor.getrgb(background)) == 3
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f'must be "{KEEP}" or a colour such as "white", "black" or "#8090a0"')
    return background


def flatten(pixels: NDArray[np.uint8], background: str) -> NDArray[np.uint8]:
    """Composite (H, W, 4) RGBA over a colour, or drop its alpha: (H, W, 3) RGB. Opaque pixels are unchanged."""
    colours = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), dtype=np.uint8)
    if background == KEEP or pixels[..., 3].min() == 255:
        return colours
    flat = Image.new("RGB", pixels.shape[1::-1], background)
    flat.paste(Image.fromarray(colours), mask=Image.fromarray(np.ascontiguousarray(pixels[..., 3])))
    return np.asarray(flat)


def describe_background(background: str) -> str:
    """What happens to alpha, for messages."""
    if background == KEEP:
        return 'alpha is dropped and the colours under it are kept ([data] background = "keep")'
    return f'composited over {background} ([data] background = "{background}")'
