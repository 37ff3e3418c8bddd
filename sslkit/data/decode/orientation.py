"""Which way up an image is: read from its metadata in every format by one rule, and turned by one function."""

import struct
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

ORIENTATION = 0x0112  # EXIF's tag, and TIFF's
METADATA = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # where Pillow keeps an orientation
CHUNK = struct.Struct(">I4s")  # size and name of a PNG's chunk
LATE = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # keywords of PNG texts that may hold an orientation

TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {  # upright, by EXIF's orientation
    2: lambda pixels: cv2.flip(pixels, 1),
    3: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_180),
    4: lambda pixels: cv2.flip(pixels, 0),
    5: cv2.transpose,
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: cv2.rotate(cv2.transpose(pixels), cv2.ROTATE_180),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


def orientation_of(image: Image.Image) -> int:
    """What EXIF, or else XMP, says: 1 (upright) to 8; 1 where it says something else."""
    if image.format != "TIFF" and not METADATA & image.info.keys():
        return 1
    try:
        said = Image.Image.getexif(image).get(ORIENTATION, 1)  # a PNG's own method decodes its pixels
    except Exception:  # junk where EXIF should be
        return 1
    return next((turn for turn in range(2, 9) if said == turn), 1)


def metadata_first(encoded: bytes) -> bytes:
    """A PNG with chunks that may tell its orientation before its pixels; Pillow reads no further for a header."""
    if encoded[:8] != b"\x89PNG\r\n\x1a\n":
        return encoded
    at, first, late = 8, 0, b""
    while at + 12 <= len(encoded):
        size, kind = CHUNK.unpack_from(encoded, at)
        if kind == b"IDAT":
            first = first or at
        elif first and (kind == b"eXIf" or encoded.startswith(LATE, at + 8)):
            late += encoded[at : at + 12 + size]
        at += 12 + size
    return encoded[:first] + late + encoded[first:] if late else encoded


def turn_upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn pixels (H, W, C) upright from EXIF's orientation, 1 to 8."""
    if orientation == 1:
        return pixels
    if pixels.shape[2] * pixels.itemsize > 32:  # bytes of a pixel, more than OpenCV's transposition takes
        turned = pixels.swapaxes(0, 1) if orientation > 4 else pixels
        turned = turned[::-1] if orientation in (3, 4, 7, 8) else turned
        return np.ascontiguousarray(turned[:, ::-1] if orientation in (2, 3, 6, 7) else turned)
    turned = TURNS[orientation](pixels)
    return turned.reshape(*turned.shape[:2], pixels.shape[2])  # OpenCV takes a single channel away
