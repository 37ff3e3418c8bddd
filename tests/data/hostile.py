"""Files nobody looked at, rendered: good images of every kind, and bad ones of every kind with the reason expected."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = (28, 36)  # height, width


def photo(seed: int = 0, size: tuple[int, int] = SIDE) -> NDArray[np.uint8]:
    """Smooth colours, (H, W, 3)."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def encode_16_bit(pixels: NDArray[np.uint8], suffix: str) -> bytes:
    """Samples of 16 bits whose high byte is ``pixels`` and whose low byte is not zero."""
    return cv2.imencode(suffix, pixels.astype(np.uint16) * 256 + 99)[1].tobytes()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def good_images() -> dict[str, bytes]:
    """Every kind that must be read, by file name."""
    image = Image.fromarray(photo())
    palette, alpha = image.quantize(32), Image.fromarray(photo(1)).convert("L")
    other = Image.fromarray(photo(2))
    files = {
        "plain.jpg": encode(image, "JPEG"),
        "progressive.jpg": encode(image, "JPEG", progressive=True),
        "grey.jpg": encode(image.convert("L"), "JPEG"),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG"),
        "cmyk.tif": encode(image.convert("CMYK"), "TIFF"),
        "plain.png": encode(image, "PNG"),
        "bits.png": encode(image.convert("1"), "PNG"),
        "palette.png": encode(palette, "PNG"),
        "see-through-palette.png": encode(palette, "PNG", transparency=3),
        "alpha.png": encode(Image.merge("RGBA", (*image.split(), alpha)), "PNG"),
        "grey-alpha.png": encode(Image.merge("LA", (image.convert("L"), alpha)), "PNG"),
        "colour16.png": encode_16_bit(photo()[..., ::-1], ".png"),
        "colour16.tiff": encode_16_bit(photo()[..., ::-1], ".tiff"),
        "plain.webp": encode(image, "WEBP", lossless=True),
        "alpha.webp": encode(Image.merge("RGBA", (*image.split(), alpha)), "WEBP", lossless=True),
        "plain.gif": encode(palette, "GIF"),
        "plain.bmp": encode(image, "BMP"),
        "plain.ppm": encode(image, "PPM"),
        "plain.jp2": encode(image, "JPEG2000"),
        "animated.gif": encode(palette, "GIF", save_all=True, append_images=[other.quantize(32)]),
        "animated.webp": encode(image, "WEBP", lossless=True, save_all=True, append_images=[other]),
        "animated.png": encode(image, "PNG", save_all=True, append_images=[other]),
        "several.mpo": encode(image, "MPO", save_all=True, append_images=[other]),
        "pixel.png": encode(image.crop((0, 0, 1, 1)), "PNG"),
        "long.png": encode(Image.fromarray(photo(3, (1, 20000))), "PNG"),
        "tall.png": encode(Image.fromarray(photo(3, (20000, 1))), "PNG"),
        "PNG named.JPG": encode(image, "PNG"),
        "plain.jpeg": encode(image, "JPEG") + b"what a camera appends",
    }
    for turned in range(2, 9):
        files[f"turned{turned}.jpg"] = encode(image, "JPEG", exif=exif(turned))
        files[f"turned{turned}.png"] = encode(image, "PNG", exif=exif(turned))
        files[f"turned{turned}.webp"] = encode(image, "WEBP", lossless=True, exif=exif(turned))
        files[f"turned{turned}.tif"] = encode(image, "TIFF", exif=exif(turned))
    return files


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, and which holds next to nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def webp_of_size(width: int, height: int) -> bytes:
    """An extended WebP whose canvas claims a size."""
    content = bytearray(encode(Image.fromarray(photo()), "WEBP", lossless=True, exif=exif(3)))
    assert content[12:16] == b"VP8X"
    content[24:27], content[27:30] = (width - 1).to_bytes(3, "little"), (height - 1).to_bytes(3, "little")
    return bytes(content)


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Every kind of content that must be refused, by file name, with words of the reason."""
    good, image = good_images(), Image.fromarray(photo())
    cut = {
        f"half-{name}": (good[name][: len(good[name]) // 2], "truncated|not JPEG")
        for name in ("plain.jpg", "progressive.jpg", "plain.png", "plain.webp", "plain.gif", "plain.bmp", "plain.jp2")
    }
    damaged = bytearray(good["plain.png"])
    damaged[len(damaged) // 2] ^= 0x5A
    return {
        **cut,
        "almost.jpg": (good["plain.jpg"][:-40], "truncated"),
        "empty.jpg": (b"", "the file is empty"),
        "page.jpg": (b"<html>404 Not Found</html>", r"not JPEG, .* it begins with b'<html>404 No'"),
        "damaged.png": (bytes(damaged), "damaged"),
        "bomb.png": (png_of_size(30_000, 30_000), "more than 89478485 pixels"),
        "bomb.webp": (webp_of_size(16_000, 16_000), "more than 89478485 pixels"),
        "liar.png": (png_of_size(9_000, 9_000), "truncated"),
        "float.tif": (encode(image.convert("F"), "TIFF"), "32 bits"),
        "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not JPEG"),
        "zeros.gif": (bytes(4096), "not JPEG"),
    }


def write_hostile_things(folder: Path) -> list[str]:
    """What is no file at all, though it is named like an image; the names of those that are listed as images."""
    (folder / "dead.jpg").symlink_to(folder / "nothing")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    (folder / "device.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    with (folder / "huge.jpg").open("wb") as stream:
        stream.truncate(2**40)  # of holes
    return ["dead.jpg", "circle.jpg", "device.jpg", "pipe.jpg", "huge.jpg"]
