"""Whether images differ at all: a folder of copies, or of black frames, trains to nothing without an error."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from sslkit.data.decode.rgb import Pixels, UnreadableImage
from sslkit.data.sources.image_source import ImageSource

LOOKED_AT = 16
FLAT = 64  # an image is of one colour if its values differ by less than this part of their range


@dataclass(frozen=True)
class Variety:
    """What was seen of a few images.

    Attributes:
        looked_at: How many.
        different: How many remain when each of several with the same pixels counts once.
        plain: How many are of one colour each.
    """

    looked_at: int
    different: int
    plain: int


def variety_of(images: Iterable[Pixels], enough: int = 0) -> Variety:
    """Compare images pixel by pixel.

    Args:
        images: Each (H, W, C), of any sizes.
        enough: Stop after so many different ones that are not of one colour; 0: never.
    """
    seen, looked_at, plain = set[bytes](), 0, 0
    for pixels in images:
        looked_at += 1
        seen.add(hashlib.blake2b(pixels.tobytes(), digest_size=16, person=_shape(pixels)).digest())
        plain += bool(np.ptp(pixels.reshape(-1, pixels.shape[-1]), axis=0).max() <= np.iinfo(pixels.dtype).max // FLAT)
        if enough and len(seen) - plain >= enough:
            break
    return Variety(looked_at, len(seen), plain)


def look_for_variety(source: ImageSource, seed: int) -> Variety:
    """Read a few images, drawn by ``seed``, until most of them have proved different."""
    chosen = source.sample(LOOKED_AT, seed)
    return variety_of(_readable(source, chosen.tolist()), enough=len(chosen) // 2 + 1)


def _readable(source: ImageSource, indices: list[int]) -> Iterator[Pixels]:
    for index in indices:
        try:
            yield source.read(index)
        except UnreadableImage:
            continue


def _shape(pixels: Pixels) -> bytes:
    """Height and width in 16 bytes: the same bytes in another shape are another picture."""
    height, width = map(int, pixels.shape[:2])
    return height.to_bytes(8, "big") + width.to_bytes(8, "big")
