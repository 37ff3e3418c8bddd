"""Arrange several images as tiles of one image."""

from collections.abc import Sequence

from PIL import Image

from sslkit.data.decode.channels import as_picture
from sslkit.data.decode.rgb import Pixels


def make_image_grid(images: Sequence[Pixels], tile: int, columns: int) -> Image.Image:
    """Scale images to square tiles of ``tile`` pixels, and put them side by side, row by row, on black.

    Each image is (H, W, 3) uint8 RGB, or (H, W, C) uint16, see `as_picture`.
    """
    grid = Image.new("RGB", (columns * tile, -(-len(images) // columns) * tile))
    for index, pixels in enumerate(images):
        image = Image.fromarray(as_picture(pixels))
        scale = tile / max(image.size)
        width, height = (max(round(side * scale), 1) for side in image.size)
        left, top = index % columns * tile, index // columns * tile
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        grid.paste(resized, (left + (tile - width) // 2, top + (tile - height) // 2))
    return grid
