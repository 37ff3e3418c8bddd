"""Images small enough to travel inside a page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sslkit.data.decode.channels import as_picture
from sslkit.data.decode.rgb import Pixels
from sslkit.data.tools.image_grid import make_image_grid

SMALL = 64  # pixels a side up to which a picture is kept as it is, without loss


def data_uri(pixels: Pixels, side: int) -> str:
    """A picture as a ``data:`` address, at most ``side`` pixels a side; PNG if small, else JPEG.

    Args:
        pixels: (H, W, 3) uint8 RGB, or (H, W, C) uint16, shown as `as_picture` does.
        side: Longer side that is not exceeded.
    """
    picture = Image.fromarray(as_picture(pixels))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _encode(picture, lossless=max(picture.size) <= SMALL)


@dataclass(frozen=True)
class Sprite:
    """Many thumbnails as the tiles of one picture, row by row.

    Attributes:
        address: The picture, as a ``data:`` address.
        tile: Side of a tile in pixels.
        columns: Tiles in a row.
        count: Tiles in all.
    """

    address: str
    tile: int
    columns: int
    count: int


def make_sprite(images: Sequence[Pixels], tile: int) -> Sprite:
    """Shrink images to fit square tiles, put them side by side, and encode them as one JPEG."""
    columns = max(int(np.ceil(np.sqrt(len(images)))), 1)
    return Sprite(_encode(make_image_grid(images, tile, columns), lossless=False), tile, columns, len(images))


def _encode(picture: Image.Image, *, lossless: bool) -> str:
    stream = io.BytesIO()
    if lossless:
        picture.save(stream, "PNG", optimize=True)
    else:
        picture.save(stream, "JPEG", quality=82)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
