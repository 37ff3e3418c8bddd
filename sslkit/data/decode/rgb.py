"""Decode untrusted image files to RGB arrays."""

import io
import logging
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, TiffImagePlugin, UnidentifiedImageError

from sslkit.data.decode.background import KEEP, flatten
from sslkit.data.decode.orientation import ORIENTATION, metadata_first, orientation_of, turn_upright
from sslkit.data.decode.png_chunks import without_profile
from sslkit.errors import UserError, first_line

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB
MAX_BYTES = 2**29  # of a file
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes of a TIFF

Pixels = NDArray[np.unsignedinteger[Any]]  # (H, W, 3) uint8 RGB, or (H, W, channels) uint16
Size = tuple[int, int]  # height, width
Reduction = Callable[[Size], int]

BITS, PHOTOMETRIC, PLANES, SAMPLE_FORMAT = 258, 262, 284, 339  # TIFF tags
SIGNED = 2  # a value of SAMPLE_FORMAT
WHITE_IS_ZERO = 0  # a value of PHOTOMETRIC
ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
GREY_TRANSPARENCY = b"\0\0\0\x02tRNS"  # start of a 2-byte PNG chunk; the name alone may occur in text
YCC = b"colr\x01\0\0\0\0\0\x12"  # colour space of a JPEG 2000

REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
TOO_LARGE = f"more than {MAX_PIXELS} pixels according to its header"

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # a damaged image is reported once, by sslkit
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # workers run in parallel already


class UnreadableImage(UserError):  # noqa: N818 - named after the image
    """An image that cannot be read, its printable ``name``, and the ``reason``.

    DataLoader re-creates the error of a worker from its message alone, without a reason.
    """

    def __init__(self, name: str, reason: str = "") -> None:
        super().__init__(f"cannot read {name} as an image: {reason}" if reason else name)
        self.reason = reason


class Header(NamedTuple):  # created for every image, faster than a dataclass
    """The metadata of an image file."""

    format: str  # one of `FORMATS`, or "MPO", a JPEG with several pictures
    mode: str  # Pillow's, such as "RGB", "CMYK" or "I;16"
    width: int  # in pixels, before rotation
    height: int
    orientation: int  # EXIF orientation, 1 (upright) to 8; 1 if it is missing or invalid
    alpha: bool = False  # an alpha channel, or a colour that means transparent
    signed: int = 0  # bits per sample if samples are signed integers, as in some TIFFs
    opencv: bool = False  # OpenCV decodes it, with the same result as Pillow, which decodes all others

    @property
    def size(self) -> Size:
        """Height and width of the upright image."""
        return (self.height, self.width) if self.orientation < 5 else (self.width, self.height)


def read_file(path: Path, span: tuple[int, int] | None = None) -> bytes:
    """Read a regular file of at most `MAX_BYTES`, or the ``span`` (offset, size) of it; never waits for a pipe.

    Raises `OSError` if it does not exist, may not be read, is not a regular file, or is too large or too short.
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
            raise OSError(f"truncated: its tar file is {offset + size - status.st_size} bytes too short")
        stream.seek(offset)
        return stream.read(size)


def read_header(encoded: bytes, name: str) -> Header:
    """Read the metadata of an image, without allocating its pixels.

    Raises `UnreadableImage` if it is no image, of an unsupported format, or has more than `MAX_PIXELS` pixels.
    """
    with warnings.catch_warnings(action="ignore"):  # about the size, which is checked below, and about metadata
        try:
            _check_webp_canvas(encoded)
            with Image.open(io.BytesIO(metadata_first(encoded)), formats=FORMATS) as image:
                header = _describe(image, encoded)
        except Exception as error:  # decoders raise all kinds of errors for invalid data
            raise UnreadableImage(name, _reason(error, encoded)) from error
    if header.width * header.height > MAX_PIXELS:
        raise UnreadableImage(name, TOO_LARGE)
    return header


def _describe(image: Image.Image, encoded: bytes) -> Header:
    width, height = image.size
    if tiff_tag(image, ORIENTATION) in ((5,), (6,), (7,), (8,)):  # Pillow gives the size after rotation
        width, height = height, width
    alpha = image.mode in ALPHA_MODES or "transparency" in image.info
    signed = max(tiff_tag(image, BITS), default=0) if SIGNED in tiff_tag(image, SAMPLE_FORMAT) else 0
    header = Header(str(image.format), image.mode, width, height, orientation_of(image), alpha, signed)
    return header._replace(opencv=_opencv_agrees(image, header, encoded))


def _opencv_agrees(image: Image.Image, header: Header, encoded: bytes) -> bool:
    """Whether OpenCV decodes an image like Pillow, as measured in docs/log.md."""
    codec, _, _, options = next(iter(getattr(image, "tile", ())), ("", None, 0, None))
    match header.format:
        case "JPEG" | "PNG" | "WEBP" | "MPO":
            return True
        case "BMP":  # OpenCV maps 5 bits to 0..248
            return not header.alpha and isinstance(options, tuple) and options[0] not in ("BGR;15", "BGR;16")
        case "PPM":  # other codecs scale values if maxval is not 255 or 65535
            return codec == "raw"
        case "JPEG2000":
            return not header.alpha and header.mode in ("L", "RGB") and _is_plain_jpeg2000(encoded)
        case "TIFF":
            upright = header.orientation == 1 and tiff_tag(image, ORIENTATION) in ((), (1,))
            plain = header.mode in ("L", "P", "RGB", "CMYK", "I;16", "I;16B") and tiff_tag(image, PLANES) in ((), (1,))
            return upright and plain and {*tiff_tag(image, BITS)} in ({8}, {16})
    return False  # GIF: other colours under transparency; AVIF: no orientation, and red and blue swapped with alpha


def tiff_tag(image: Image.Image, number: int) -> tuple[Any, ...]:
    """The values of a TIFF tag; empty if the image does not have it."""
    values = getattr(image, "tag_v2", {}).get(number, ())
    return values if isinstance(values, tuple) else (values,)


def _is_plain_jpeg2000(encoded: bytes) -> bool:
    """Whether a JPEG 2000 has 8 bits and no subsampling, in grey or RGB."""
    at = encoded.find(b"\xff\x4f\xff\x51")
    if at < 0 or YCC in encoded[:at] or b"pclr" in encoded[:at]:
        return False
    count = int.from_bytes(encoded[at + 40 : at + 42], "big")
    return encoded[at + 42 : at + 42 + 3 * count] == b"\x07\x01\x01" * count


def decode_rgb(encoded: bytes, name: str, background: str = KEEP) -> Pixels:
    """Decode an image to (H, W, 3) uint8 RGB, upright according to its EXIF orientation.

    Grey is repeated, palettes are applied, CMYK is converted without a colour profile, 16-bit samples keep their high
    byte, and animations give their first frame. Except for 16-bit grey, the result equals Pillow's ``convert("RGB")``
    within one level. Transparent pixels are composited over ``background``; ``"keep"`` drops alpha. Raises
    `UnreadableImage` if the bytes are no image, damaged or too large, or of a sample type without an 8-bit form.
    """
    return decode_reduced(encoded, name, lambda _size: 1, background)[0]


def decode_reduced(encoded: bytes, name: str, reduction: Reduction, background: str = KEEP) -> tuple[Pixels, Size]:
    """Decode an image like `decode_rgb`, a JPEG at reduced size if requested, which is faster.

    ``reduction`` is called with height and width of the upright image. It returns the factor 1, 2, 4 or 8 by which a
    JPEG may be reduced, each block of pixels to its mean. Returns the pixels, and height and width of the full image.
    """
    header = read_header(encoded, name)
    by = reduction(header.size) if header.format in ("JPEG", "MPO") else 1
    pixels = _decode(encoded, name, header, by, with_alpha=header.alpha and background != KEEP)
    if pixels.shape[2] == 4:
        pixels = flatten(pixels, background)
    return pixels, header.size if by > 1 else pixels.shape[:2]


def is_transparent(encoded: bytes, name: str) -> bool:
    """Whether an image has a pixel that is not opaque. Raises `UnreadableImage` if it cannot be decoded."""
    pixels = _decode(encoded, name, read_header(encoded, name), 1, with_alpha=True)
    return pixels.shape[2] == 4 and int(pixels[..., 3].min()) < 255


def _decode(encoded: bytes, name: str, header: Header, by: int, *, with_alpha: bool) -> NDArray[np.uint8]:
    """Upright pixels: (H, W, 3) RGB or, ``with_alpha``, (H, W, 4) RGBA if there is alpha."""
    if reason := _not_8_bits(header):
        raise UnreadableImage(name, reason)
    try:
        pixels = _decode_with_opencv(encoded, header, by, with_alpha=with_alpha) if header.opencv else None
        if pixels is None:
            pixels = _decode_with_pillow(encoded, header, with_alpha=with_alpha)
    except Exception as error:
        raise UnreadableImage(name, _reason(error, encoded)) from error
    # Both decoders rotate TIFFs themselves.
    return pixels if header.format == "TIFF" else turn_upright(pixels, header.orientation)


def _not_8_bits(header: Header) -> str:
    """Why samples do not fit into 8 bits; empty if they do."""
    if header.signed in (8, 16):
        return (
            "signed samples, which do not fit into the 8 bits of RGB; read them unchanged with [backbone] args = "
            "{ in_chans = 1 }, or convert them to unsigned ones"
        )
    if header.mode == "F" or (header.mode == "I" and header.format != "PPM"):
        return (
            "samples of 32 bits, whose range is unknown; convert it to 8 or 16 bits (16 are kept with [backbone] "
            "args = { in_chans = 1 })"
        )
    return ""


def _decode_with_opencv(encoded: bytes, header: Header, by: int, *, with_alpha: bool) -> NDArray[np.uint8] | None:
    """Pixels, rotated only if a TIFF; None if OpenCV cannot decode it."""
    flags = cv2.IMREAD_UNCHANGED if with_alpha else REDUCED.get(by, cv2.IMREAD_COLOR_RGB)
    try:
        pixels = cv2.imdecode(
            np.frombuffer(without_profile(encoded), dtype=np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION
        )
    except cv2.error:  # for example an image too large for OpenCV
        return None
    if pixels is None:
        return None
    if with_alpha:
        return _rgba(pixels, encoded)
    return np.asarray(pixels if by == 1 else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _rgba(pixels: NDArray[Any], encoded: bytes) -> NDArray[np.uint8]:
    """Convert grey, BGR or BGRA to RGBA; ``encoded`` is a PNG that may define a transparent grey."""
    if pixels.ndim == 2:
        alpha = np.full_like(pixels, np.iinfo(pixels.dtype).max)
        at = encoded.find(GREY_TRANSPARENCY)
        if at > 0:
            value, depth = int.from_bytes(encoded[at + 8 : at + 10], "big"), encoded[24]
            alpha[pixels == value * int(alpha[0, 0]) // (2**depth - 1)] = 0
        pixels = np.dstack([pixels, pixels, pixels, alpha])
    else:
        code = cv2.COLOR_BGR2RGBA if pixels.shape[2] == 3 else cv2.COLOR_BGRA2RGBA
        pixels = np.asarray(cv2.cvtColor(pixels, code), dtype=pixels.dtype)
    return np.asarray(pixels >> 8 if pixels.dtype == np.uint16 else pixels, dtype=np.uint8)


def _decode_with_pillow(encoded: bytes, header: Header, *, with_alpha: bool) -> NDArray[np.uint8]:
    """Pixels, rotated only if a TIFF."""
    with warnings.catch_warnings(action="ignore"), open_for_pixels(encoded) as image:
        if header.mode.startswith("I"):  # 16 bits, which Pillow would clip to 255
            return np.repeat((grey_16(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        image.load()
        wanted = "RGBA" if with_alpha else "RGB"
        return np.asarray(image if image.mode == wanted else image.convert(wanted))


def open_for_pixels(encoded: bytes) -> Image.Image:
    """Open an image with Pillow; with libtiff for planar TIFFs, whose 16-bit samples Pillow alone reads as zeros."""
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    if tiff_tag(image, PLANES) != (2,):
        return image
    TiffImagePlugin.READ_LIBTIFF = True
    try:
        return Image.open(io.BytesIO(encoded), formats=FORMATS)
    finally:
        TiffImagePlugin.READ_LIBTIFF = False


def grey_16(image: Image.Image) -> NDArray[np.uint16]:
    """(H, W) values of a 16-bit grey image, full scale 65535. Pillow does not scale 12 bits or invert white-is-zero."""
    bits, inverted = tiff_tag(image, BITS), tiff_tag(image, PHOTOMETRIC) == (WHITE_IS_ZERO,)
    values = np.asarray(image).astype(np.uint16)
    if bits == (12,):
        values = np.asarray(values << 4 | values >> 8, dtype=np.uint16)
    return 65_535 - values if inverted else values


def _check_webp_canvas(encoded: bytes) -> None:
    """Check the size of an extended WebP first, as Pillow allocates its canvas when it opens the file."""
    if encoded[:4] == b"RIFF" and encoded[8:16] == b"WEBPVP8X":
        width, height = (int.from_bytes(encoded[at : at + 3], "little") + 1 for at in (24, 27))
        if width * height > MAX_PIXELS:
            raise Image.DecompressionBombError


def _reason(error: Exception, encoded: bytes) -> str:
    if not encoded:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError) and encoded[:4] in TIFF:
        return (
            "a TIFF that is not grey or colour in 8 or 16 bits; images of n channels in 8 or 16 bits need [backbone] "
            "args = { in_chans = n }, others must be converted"
        )
    if isinstance(error, UnidentifiedImageError):
        return f"not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}; it begins with {encoded[:12]!r}"
    return TOO_LARGE if isinstance(error, Image.DecompressionBombError) else damaged(error)


def damaged(error: Exception) -> str:
    """The reason of an image that a decoder failed on."""
    return f"damaged or truncated ({first_line(error, 100)})"
