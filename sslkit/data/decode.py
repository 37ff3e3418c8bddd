"""From encoded bytes to an RGB array."""

import io

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sslkit.errors import UserError


def decode_rgb(encoded: bytes, name: str) -> NDArray[np.uint8]:
    """Decode one image to (H, W, 3) uint8 RGB, upright by its EXIF tag; grey is repeated, alpha dropped.

    Args:
        encoded: The file's content (JPEG, PNG, WebP, TIFF ...). OpenCV decodes; Pillow takes what OpenCV refuses.
        name: What to call the image in an error.

    Raises:
        UserError: The bytes are not an image, or a broken one.
    """
    buffer = np.frombuffer(encoded, dtype=np.uint8)
    try:
        pixels = cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB) if buffer.size else None
    except cv2.error:  # such as an image too large to be one
        pixels = None
    if pixels is not None:
        return np.asarray(pixels, dtype=np.uint8)
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read {name} as an image ({type(error).__name__})") from error
