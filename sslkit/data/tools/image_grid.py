"""Many pictures as the tiles of one."""

from collections.abc import Sequence

from PIL import Image

from sslkit.data.decode.channels import as_picture
from sslkit.data.decode.rgb import Pixels


def tile_sheet(images: Sequence[Pixels], tile: int, columns: int) -> Image.Image:
    """Shrink or enlarge pictures to fit square tiles, and put them side by side, row by row, on black.

    Args:
        images: Each (H, W, 3) uint8 RGB, or (H, W, C) uint16, shown as `as_picture` does.
        tile: Side of a tile in pixels.
        columns: Tiles in a row.
    """
    sheet = Image.new("RGB", (columns * tile, -(-len(images) // columns) * tile))
    for index, pixels in enumerate(images):
        picture = Image.fromarray(as_picture(pixels))
        picture = picture.resize(_fit(picture.size, tile), Image.Resampling.BILINEAR)
        left, top = index % columns * tile, index // columns * tile
        sheet.paste(picture, (left + (tile - picture.width) // 2, top + (tile - picture.height) // 2))
    return sheet


def _fit(size: tuple[int, int], tile: int) -> tuple[int, int]:
    scale = tile / max(size)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)
