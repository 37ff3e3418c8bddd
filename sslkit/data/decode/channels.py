"""Decode images with any number of channels in 8 or 16 bits, such as those of microscopes, satellites and X-rays.

Values have 16 bits. 8-bit values are multiplied by 257, so that full scale is always 65535 and nothing is lost.
Signed values are shifted up by half of their range, 32768 or 128.
"""

import importlib
import io
import logging
import warnings
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sslkit.data.decode.orientation import ORIENTATION, turn_upright
from sslkit.data.decode.png_chunks import without_profile
from sslkit.data.decode.rgb import (
    MAX_PIXELS,
    TIFF,
    WHITE_IS_ZERO,
    Header,
    Pixels,
    UnreadableImage,
    damaged,
    grey_16,
    open_for_pixels,
    read_header,
)
from sslkit.errors import UserError

FULL_SCALE = 65_535
FROM_8_BITS = 257  # 255 * 257 = 65535
MODES = {"L": 1, "I;16": 1, "I;16B": 1, "I;16L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}
DEEP_PNG = b"\x10\x06"  # bit depth and colour type of a 16-bit RGBA PNG

Channels = NDArray[np.uint16]


def decode_channels(encoded: bytes, name: str, channels: int) -> Channels:
    """Decode an image to (H, W, channels) uint16, full scale 65535, upright according to its EXIF orientation.

    One to four 8-bit channels, or one 16-bit channel, may have any format; 16-bit RGBA may be PNG. Everything else must
    be TIFF, with channels as samples or as pages. Raises `UnreadableImage` for other data, another number of channels,
    or another type, and `UserError` if `tifffile` is needed and not installed.
    """
    decode = _decode_tiff if encoded[:4] in TIFF and channels > 1 else _decode_plain
    values = decode(encoded, name, channels)
    return values if values.dtype == np.uint16 else values.astype(np.uint16) * np.uint16(FROM_8_BITS)


def as_picture(values: NDArray[Any]) -> Pixels:
    """Make (H, W, C) values visible as (H, W, 3) uint8: the first three channels, or the first as grey, stretched.

    8-bit RGB is returned unchanged.
    """
    if values.dtype == np.uint8:
        return np.asarray(values, dtype=np.uint8)
    chosen = values[..., :3] if values.shape[2] >= 3 else np.repeat(values[..., :1], 3, axis=2)
    low, high = float(chosen.min()), float(chosen.max())
    return np.asarray(np.rint((chosen - low) * (255.0 / max(high - low, 1.0))), dtype=np.uint8)


def _decode_plain(encoded: bytes, name: str, channels: int) -> NDArray[Any]:
    header = read_header(encoded, name)
    found = _channels_of(header)
    if header.mode == "P":
        raise UnreadableImage(name, "its pixels are indices of a palette; convert it to grey or colour")
    if found != channels:
        there = f"{found} channels" if found else "no channels of 8 or 16 bits"
        raise UnreadableImage(name, f"{there} (mode {header.mode}), but [backbone] in_chans is {channels}")
    if header.format == "PNG" and encoded[24:25] == b"\x10" and channels > 1:
        if encoded[24:26] != DEEP_PNG:
            raise UnreadableImage(name, "a PNG of 16-bit grey with alpha, which would lose bits; convert it to TIFF")
        values = cv2.imdecode(np.frombuffer(without_profile(encoded), dtype=np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None or values.ndim != 3 or values.shape[2] != channels:
            raise UnreadableImage(name, "damaged or truncated")
        return turn_upright(np.asarray(values[..., [2, 1, 0, 3]]), header.orientation)
    if header.format == "JPEG2000" and channels > 1:
        raise UnreadableImage(name, "JPEG 2000 with several channels, which could lose bits; convert it to TIFF")
    values = _read_plain(encoded, name, header)
    values = values.reshape(*values.shape[:2], channels)
    return values if header.format == "TIFF" else turn_upright(values, header.orientation)  # Pillow rotates TIFFs


def _read_plain(encoded: bytes, name: str, header: Header) -> NDArray[Any]:
    """Decode with Pillow to unsigned values of full scale."""
    try:
        with warnings.catch_warnings(action="ignore"), open_for_pixels(encoded) as image:
            _check_pages(image, name)
            if header.signed:
                return _unsigned(np.asarray(image).astype(f"i{header.signed // 8}"))
            if image.mode.startswith("I"):
                return grey_16(image)
            return np.asarray(image.convert("L") if image.mode == "1" else image)
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise all kinds of errors for invalid data
        raise UnreadableImage(name, damaged(error)) from error


def _unsigned(values: NDArray[Any]) -> NDArray[Any]:
    """Shift signed values up by half of their range, so that the lowest becomes 0."""
    unsigned = values.view(np.dtype(f"u{values.itemsize}"))
    return np.asarray(unsigned ^ np.array(1 << (8 * values.itemsize - 1), unsigned.dtype))


def _channels_of(header: Header) -> int:
    """Number of 8-bit or 16-bit channels of a Pillow mode; 0 if it has others."""
    # Pillow opens some 16-bit samples as "I", which has 32 bits.
    if header.mode == "1" or (header.mode == "I" and (header.format == "PPM" or header.signed == 16)):
        return 1
    return MODES.get(header.mode, 0)


def _check_pages(image: Image.Image, name: str) -> None:
    """Refuse a TIFF with several pages of the same size, which may be channels; a smaller page is a preview."""
    if image.format != "TIFF" or (pages := int(getattr(image, "n_frames", 1))) == 1:
        return
    size = image.size
    image.seek(1)
    if image.size == size:
        raise UnreadableImage(name, f"{pages} pages, but [backbone] in_chans is 1")
    image.seek(0)


def _decode_tiff(encoded: bytes, name: str, channels: int) -> NDArray[Any]:
    try:
        tifffile = importlib.import_module("tifffile")
    except ImportError as error:
        raise UserError(f"{name}: TIFF with several channels needs tifffile: pip install tifffile") from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # a damaged image is reported once, by sslkit
    try:
        with tifffile.TiffFile(io.BytesIO(encoded)) as tiff:
            pages = _pages(tiff)
            axes, shape, dtype = str(pages[0].axes), tuple(pages[0].shape), np.dtype(pages[0].dtype)
            if len(pages) > 1:
                axes, shape = f"C{axes}", (len(pages), *shape)
            if np.prod(shape, dtype=np.float64) > 3 * MAX_PIXELS:
                raise UnreadableImage(name, f"more than {3 * MAX_PIXELS} values according to its header")
            _check_type(name, axes, shape, dtype, channels)
            turn = tiff.pages[0].tags.get(ORIENTATION)
            orientation = next((each for each in range(2, 9) if turn is not None and turn.value == each), 1)
            values = np.stack([each.asarray() for each in pages]) if len(pages) > 1 else np.asarray(pages[0].asarray())
            if dtype.kind == "i":
                values = _unsigned(values)
            if tiff.pages[0].photometric == WHITE_IS_ZERO:
                values = np.iinfo(values.dtype).max - values
    except UserError:
        raise
    except Exception as error:
        raise UnreadableImage(name, damaged(error)) from error
    x, y = axes.index("X"), axes.index("Y")
    order = (y, x, *(axis for axis in range(len(axes)) if axis not in (y, x)))
    return turn_upright(values.transpose(order).reshape(shape[y], shape[x], channels), orientation)


def _pages(tiff: Any) -> list[Any]:
    """The first image of a TIFF, or all of them if they are equal pages that were written one by one."""
    first, planes = tiff.series[0], [each for each in tiff.series if each.axes == "YX"]
    equal = all((each.shape, each.dtype) == (first.shape, first.dtype) for each in planes)
    return planes if equal and len(planes) == len(tiff.series) else [first]


def _check_type(name: str, axes: str, shape: tuple[int, ...], dtype: np.dtype[Any], channels: int) -> None:
    others = [size for axis, size in zip(axes, shape, strict=True) if axis not in "XY" and size > 1]
    if "X" not in axes or "Y" not in axes or len(others) > 1:
        raise UnreadableImage(name, f"axes {axes} of {shape}, so that it is unclear which are the channels")
    if (found := others[0] if others else 1) != channels:
        raise UnreadableImage(name, f"{found} channels, but [backbone] in_chans is {channels}")
    if dtype not in (np.uint8, np.uint16, np.int8, np.int16):
        raise UnreadableImage(name, f"values of type {dtype}, whose range is unknown; convert them to 8 or 16 bits")
