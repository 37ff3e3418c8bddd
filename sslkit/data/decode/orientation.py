"""Read the orientation of an image from its metadata, in any format, and rotate it upright."""

import struct
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

ORIENTATION = 0x0112  # tag of EXIF and TIFF
METADATA = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # Pillow's keys for it
CHUNK = struct.Struct(">I4s")  # size and name of a PNG chunk
LATE = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # keywords of PNG text chunks with it


def orientation_of(image: Image.Image) -> int:
    """The orientation in EXIF or else XMP: 1 (upright) to 8; 1 if it is missing or invalid."""
    if image.format != "TIFF" and not METADATA & image.info.keys():
        return 1
    try:
        value = Image.Image.getexif(image).get(ORIENTATION, 1)  # the method of PNGs would decode the pixels
    except Exception:  # invalid EXIF
        return 1
    return next((turn for turn in range(2, 9) if value == turn), 1)


def metadata_first(encoded: bytes) -> bytes:
    """Move chunks of a PNG that may contain its orientation before the pixels, where Pillow stops reading a header."""
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


def transpose(pixels: NDArray[Any]) -> NDArray[Any]:
    """Transpose (H, W, C) to (W, H, C), contiguous."""
    if pixels.shape[2] > 4:
        return np.ascontiguousarray(pixels.swapaxes(0, 1))
    return cv2.transpose(pixels).reshape(pixels.shape[1], pixels.shape[0], -1)  # ten times as fast as NumPy


def mirror(pixels: NDArray[Any]) -> NDArray[Any]:
    """Mirror (H, W, C) left to right, contiguous."""
    if pixels.shape[2] > 4:
        return np.ascontiguousarray(pixels[:, ::-1])
    return cv2.flip(pixels, 1).reshape(pixels.shape)


def turn_upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Rotate and flip (H, W, C) pixels upright, given their EXIF orientation, 1 to 8."""
    turned = transpose(pixels) if orientation > 4 else pixels
    if orientation in (2, 3, 6, 7):
        turned = mirror(turned)
    return np.ascontiguousarray(turned[::-1]) if orientation in (3, 4, 7, 8) else turned
