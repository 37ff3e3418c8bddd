"""From a file of any content to an RGB array, or a reason why not. Nothing here trusts the file."""

import io
import logging
import os
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from sslkit.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 89_478_485  # Pillow's own bound: 256 MiB of RGB
MAX_BYTES = 2**29  # of a file
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # what one begins with

Pixels = NDArray[np.unsignedinteger[Any]]  # (H, W, 3) uint8 RGB, or (H, W, channels) uint16
Size = tuple[int, int]  # height, width
Reduction = Callable[[Size], int]

_REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # a broken image is reported by us, once
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)


class UnreadableImage(UserError):  # noqa: N818 - what it is, not what happened
    """An image that cannot be read.

    Attributes:
        reason: Why, in a few words.

    Args:
        name: What to call the image, printable.
        reason: Why; empty where a DataLoader makes a worker's error anew, from its text alone.
    """

    def __init__(self, name: str, reason: str = "") -> None:
        super().__init__(f"cannot read {name} as an image: {reason}" if reason else name)
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """What an image says of itself.

    Attributes:
        format: One of `FORMATS`, or ``"MPO"``, a JPEG of several pictures.
        mode: Pillow's word for the pixels, such as ``"RGB"``, ``"CMYK"`` or ``"I;16"``.
        width: In pixels, before it is turned upright.
        height: Likewise.
        orientation: EXIF's, 1 (upright) to 8; 1 where reading it would need the whole image.
    """

    format: str
    mode: str
    width: int
    height: int
    orientation: int


def read_file(path: Path, span: tuple[int, int] | None = None) -> bytes:
    """The content of a regular file of at most 512 MiB; never waits for a pipe or a device.

    Args:
        path: The file.
        span: Offset and size of the part that is meant; none for all of it.

    Raises:
        OSError: There is no such file, or no right to read it, or it is not one to be read.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        offset, size = span or (0, status.st_size)
        if size > MAX_BYTES:
            raise OSError(f"{size} bytes, more than {MAX_BYTES}")
        if size < 0:
            raise OSError("a link in a tar file, without content of its own")
        if offset + size > status.st_size:
            raise OSError(f"cut short: its tar file ends {offset + size - status.st_size} bytes before it does")
        stream.seek(offset)
        return stream.read(size)


def read_header(encoded: bytes, name: str) -> Header:
    """Read what an image says of itself, without memory for its pixels.

    Raises:
        UnreadableImage: No image of a kind that is read, or one of more than `MAX_PIXELS` pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the size, which is judged below, and of odd metadata
        try:
            _check_webp_canvas(encoded)
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                # Pillow has to decode a PNG to find EXIF data that may stand at its end.
                looks = image.format != "PNG" or "exif" in image.info
                orientation = image.getexif().get(0x0112, 1) if looks else 1
                header = Header(str(image.format), image.mode, image.width, image.height, orientation)
        except Exception as error:  # what decoders raise about junk is no closed set
            raise UnreadableImage(name, _reason(error, encoded)) from error
    if header.width * header.height > MAX_PIXELS:
        raise UnreadableImage(name, _too_large())
    return header


def decode_rgb(encoded: bytes, name: str) -> Pixels:
    """Decode one image to (H, W, 3) uint8 RGB, upright by its EXIF tag.

    Grey is repeated, palettes are looked up, alpha is dropped, CMYK is converted without a colour profile, 16-bit
    samples keep their high byte, and of an animation the first frame is taken: what Pillow's ``convert("RGB")`` gives,
    except that Pillow clips 16-bit grey to white.

    Args:
        encoded: The file's content. OpenCV decodes; Pillow reads the header and takes what OpenCV refuses.
        name: What to call the image in an error, printable.

    Raises:
        UnreadableImage: The bytes are not an image, or a broken one, or too large a one.
    """
    return decode_reduced(encoded, name, lambda _size: 1)[0]


def decode_reduced(encoded: bytes, name: str, reduction: Reduction) -> tuple[Pixels, Size]:
    """Decode an image, a JPEG in a smaller size if asked: libjpeg leaves out the work for what is not wanted.

    Args:
        encoded: As `decode_rgb` takes it.
        name: Likewise.
        reduction: Is told height and width of the image, upright, and tells by which of 1, 2, 4 and 8 it may be
            reduced, each block of pixels to its mean.

    Returns:
        Pixels as `decode_rgb` gives them, and height and width of the whole image.
    """
    header = read_header(encoded, name)
    size = (header.height, header.width) if header.orientation < 5 else (header.width, header.height)
    flags = _REDUCED[reduction(size)] if header.format in ("JPEG", "MPO") else cv2.IMREAD_COLOR_RGB
    try:
        pixels = cv2.imdecode(np.frombuffer(encoded, dtype=np.uint8), flags)
    except cv2.error:  # such as an image too large for it
        pixels = None
    if pixels is not None:
        rgb = pixels if flags == cv2.IMREAD_COLOR_RGB else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
        return np.asarray(rgb, dtype=np.uint8), size
    if header.mode in ("F", "I"):
        raise UnreadableImage(name, "samples of 32 bits, whose range nothing tells; convert it to 8 or 16 bits")
    try:
        return _decode_with_pillow(encoded), size
    except Exception as error:
        raise UnreadableImage(name, _reason(error, encoded)) from error


def _decode_with_pillow(encoded: bytes) -> Pixels:
    with warnings.catch_warnings(), Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        warnings.simplefilter("ignore")
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            grey = (np.asarray(upright) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        return np.asarray(upright.convert("RGB"))


def _check_webp_canvas(encoded: bytes) -> None:
    """Pillow allocates an extended WebP's canvas when it opens it, so its size is read here first."""
    if encoded[:4] == b"RIFF" and encoded[8:16] == b"WEBPVP8X":
        width, height = (int.from_bytes(encoded[at : at + 3], "little") + 1 for at in (24, 27))
        if width * height > MAX_PIXELS:
            raise Image.DecompressionBombError


def _reason(error: Exception, encoded: bytes) -> str:
    if not encoded:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError) and encoded[:4] in TIFF:
        return (
            "a TIFF whose channels or values are not those of grey or colour in 8 or 16 bits; images of n channels "
            "want [backbone] args = { in_chans = n }"
        )
    if isinstance(error, UnidentifiedImageError):
        return f"not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}; it begins with {encoded[:12]!r}"
    if isinstance(error, Image.DecompressionBombError):
        return _too_large()
    said = " ".join(str(error).split())[:100]
    return f"broken or cut short ({said or type(error).__name__})"


def _too_large() -> str:
    return f"more than {MAX_PIXELS} pixels, so refused by its header"
