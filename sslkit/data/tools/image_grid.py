"""Arrange images in a grid."""

from collections.abc import Sequence

from PIL import Image

from sslkit.data.decode.channels import as_picture
from sslkit.data.decode.rgb import Pixels


def make_image_grid(images: Sequence[Pixels], tile: int, columns: int) -> Image.Image:
    """Resize images to fit square tiles, and arrange them row by row on black.

    Args:
        images: Each (H, W, 3) uint8 RGB, or (H, W, C) uint16, converted by `as_picture`.
        tile: Side of a tile in pixels.
        columns: Number of tiles in a row.
    """
    grid = Image.new("RGB", (columns * tile, -(-len(images) // columns) * tile))
    for index, pixels in enumerate(images):
        picture = Image.fromarray(as_picture(pixels))
        picture = picture.resize(_fit(picture.size, tile), Image.Resampling.BILINEAR)
        left, top = index % columns * tile, index // columns * tile
        grid.paste(picture, (left + (tile - picture.width) // 2, top + (tile - picture.height) // 2))
    return grid


def _fit(size: tuple[int, int], tile: int) -> tuple[int, int]:
    scale = tile / max(size)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)
