"""Thumbnails embedded in a page as ``data:`` URIs."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from sslkit.data.decode.channels import as_picture
from sslkit.data.decode.rgb import Pixels
from sslkit.data.tools.image_grid import make_image_grid

MAX_LOSSLESS = 64  # pixels; larger thumbnails are stored as JPEG


def data_uri(pixels: Pixels, side: int) -> str:
    """A thumbnail as a ``data:`` URI; PNG if small, else JPEG. Smaller images than ``side`` pixels are not enlarged.

    ``pixels`` are (H, W, 3) uint8 RGB, or (H, W, C) uint16, converted by `as_picture`.
    """
    picture = Image.fromarray(as_picture(pixels))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _encode(picture, lossless=max(picture.size) <= MAX_LOSSLESS)


@dataclass(frozen=True)
class Sprite:
    """Many thumbnails as the tiles of one image, row by row, as a ``data:`` URI."""

    uri: str
    tile: int  # pixels
    columns: int
    count: int


def make_sprite(images: Sequence[Pixels], tile: int) -> Sprite:
    """Arrange images in a square grid of tiles and encode it as one JPEG."""
    columns = max(math.ceil(math.sqrt(len(images))), 1)
    return Sprite(_encode(make_image_grid(images, tile, columns), lossless=False), tile, columns, len(images))


def _encode(picture: Image.Image, *, lossless: bool) -> str:
    stream, kind = io.BytesIO(), "png" if lossless else "jpeg"
    picture.save(stream, kind, **({"optimize": True} if lossless else {"quality": 82}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
