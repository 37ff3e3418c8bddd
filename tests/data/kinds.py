"""Images of every kind, made: format x mode x orientation x alpha x animation, and TIFFs that only a writer makes."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

H, W = 24, 40
LOSSLESS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True, "exact": True},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
    "PPM": {},
    "JPEG2000": {"irreversible": False},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}
TURNED = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")  # formats that Pillow writes EXIF to
MODES = ("RGB", "L", "1", "RGBA", "LA", "P", "P+", "PA", "CMYK", "YCbCr", "LAB", "RGB+", "L+", "I;16")


def colours() -> NDArray[np.uint8]:
    """(H, W, 3), no symmetry, the first square of one colour."""
    y, x = np.mgrid[0:H, 0:W]
    pixels = np.stack([x * 6 % 256, y * 10 % 256, (x + y) * 4 % 256], axis=2).astype(np.uint8)
    pixels[:8, :8] = [250, 10, 20]
    return pixels


def alphas() -> NDArray[np.uint8]:
    """(H, W): opaque, half transparent, transparent."""
    alpha = np.full((H, W), 255, dtype=np.uint8)
    alpha[:, W // 3 : W // 2], alpha[:, W // 2 :] = 120, 0
    return alpha


def rgba() -> NDArray[np.uint8]:
    return np.dstack([colours(), alphas()])


def picture(mode: str) -> tuple[Image.Image, dict[str, Any]]:
    """An image, and options to save it with; ``+`` is for a colour that means transparent."""
    colour, grey = Image.fromarray(colours()), Image.fromarray(colours()[..., 0])
    made: dict[str, Callable[[], Image.Image]] = {
        "RGB": lambda: colour,
        "L": lambda: grey,
        "1": lambda: grey.point(lambda value: 255 * (value > 128)).convert("1"),
        "RGBA": lambda: Image.fromarray(rgba()),
        "LA": lambda: Image.fromarray(np.dstack([colours()[..., 0], alphas()])),
        "P": lambda: colour.quantize(64),
        "PA": lambda: colour.quantize(64).convert("PA"),
        "I;16": lambda: Image.fromarray(colours()[..., 0].astype(np.uint16) * 256 + 7),
    }
    bare = mode.removesuffix("+")
    keys: dict[str, Any] = {"P": 3, "RGB": (250, 10, 20), "L": 250}
    options = {"transparency": keys[bare]} if mode != bare else {}
    return made.get(bare, lambda: colour.convert(bare))(), options


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def exif(value: Any, kind: int = 3, count: int = 1) -> bytes:
    """EXIF with an orientation of any value and type: 2 text, 3 short, 4 long, 5 rational."""
    forms = {2: "<4s", 3: "<HH", 4: "<I", 5: "<I", 8: "<hh"}
    packed = struct.pack(forms[kind], *(value if isinstance(value, tuple) else (value,)))
    behind = struct.pack("<II", 6, 1) if kind == 5 else b""
    entry = struct.pack("<HHI", 0x0112, kind, count) + packed
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0) + behind


ORIENTATIONS: dict[str, bytes] = {str(turn): exif((turn, 0)) for turn in (*range(10), 65535)} | {
    "long 6": exif(6, 4),
    "text 6": exif(b"6\0\0\0", 2, 2),
    "rational 6": exif(26, 5),
    "two": exif((6, 6), 3, 2),
    "negative": exif((-1, 0), 8),
}


def upright_cases() -> Iterator[tuple[str, bytes]]:
    """Every format and mode that can be written, in every orientation that its format can say."""
    for kind, options in LOSSLESS.items():
        for mode in MODES:
            for animated in (False, True):
                image, more = picture(mode)
                many = {"save_all": True, "append_images": [picture("RGB")[0].convert(image.mode)]} if animated else {}
                if animated and (mode not in ("RGB", "RGBA", "P") or kind in ("JPEG", "BMP", "PPM", "JPEG2000")):
                    continue
                try:
                    plain = save(image, kind, **options, **more, **many)
                except (OSError, ValueError, KeyError, TypeError):
                    continue  # no such mode in this format
                name = f"{kind} {mode}{' animated' * animated}"
                yield name, plain
                for turn, tag in ORIENTATIONS.items() if kind in TURNED else ():
                    number = turn.isdigit() and int(turn)
                    # What their writers take; AVIF's ends the process at an animation that is turned.
                    if kind in ("TIFF", "AVIF") and (not (number and number < 9) or (kind == "AVIF" and animated)):
                        continue
                    yield f"{name} turned {turn}", save(image, kind, **options, **more, **many, exif=tag)


def tiff(pixels: NDArray[Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, **options)
    return stream.getvalue()


def packed_tiff(values: NDArray[np.int64], bits: int) -> bytes:
    """A TIFF of grey with any number of bits, (H, W)."""
    rows = [((row[:, None] >> np.arange(bits - 1, -1, -1)) & 1).astype(np.uint8).ravel() for row in values]
    data = b"".join(np.packbits(row).tobytes() for row in rows)
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags.append((279, len(data)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = struct.pack("<I", 8 + len(data))
    return b"II*\0" + start + data + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: NDArray[Any], depth: int, colour: int, *, key: tuple[int, ...] = (), late: bytes = b"") -> bytes:
    """A PNG of samples of 8 or 16 bits, or packed rows; a colour that means transparent; chunks behind the pixels."""
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", W, H, depth, colour, 0, 0, 0)
    means = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    body = chunk(b"IHDR", head) + means + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + late + chunk(b"IEND", b"")


def pgm(maxval: int, channels: int, *, plain: bool) -> bytes:
    """A PGM or PPM whose white is ``maxval``."""
    pixels = colours()[..., :channels]
    values = np.rint(pixels.astype(float) * maxval / 255).astype(int)
    number = {(1, False): 5, (3, False): 6, (1, True): 2, (3, True): 3}[channels, plain]
    head = b"P%d\n%d %d\n%d\n" % (number, W, H, maxval)
    if plain:
        return head + b" ".join(b"%d" % value for value in values.ravel())
    return head + values.astype(np.uint8 if maxval < 256 else ">u2").tobytes()


def bmp_16(fields: bool) -> bytes:
    """A BMP of 5 bits a colour, or of 5, 6 and 5."""
    red, green, blue = (colours()[::-1, :, channel].astype(np.uint16) for channel in range(3))
    if fields:
        values, masks = (red >> 3) << 11 | (green >> 2) << 5 | blue >> 3, struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    else:
        values, masks = (red >> 3) << 10 | (green >> 3) << 5 | blue >> 3, b""
    data = values.astype("<u2").tobytes()
    info = struct.pack("<IiiHHIIiiII", 40, W, H, 1, 16, 3 * fields, len(data), 2835, 2835, 0, 0) + masks
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(data), 0, 0, 14 + len(info)) + info + data
