"""Whether images differ at all: training on copies or on black frames learns nothing, and raises no error."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from sslkit.data.decode.rgb import Pixels, UnreadableImage
from sslkit.data.sources.image_source import ImageSource

SAMPLED = 16
FLAT = 64  # an image has a single colour if its values differ by at most 1/64 of their range


@dataclass(frozen=True)
class Variety:
    """Counts of a sample of images."""

    sampled: int  # all of them
    different: int  # those that differ in pixels
    plain: int  # those that have a single colour


def variety_of(images: Iterable[Pixels], enough: int = 0) -> Variety:
    """Compare images (H, W, C) of any sizes, pixel by pixel.

    Stops after ``enough`` different images that have more than one colour; 0 never stops.
    """
    seen, sampled, plain = set[bytes](), 0, 0
    for pixels in images:
        sampled += 1
        shape = np.array(pixels.shape[:2], ">i8").tobytes()  # the same bytes in another shape are another image
        seen.add(hashlib.blake2b(pixels.tobytes(), digest_size=16, person=shape).digest())
        plain += bool(np.ptp(pixels.reshape(-1, pixels.shape[-1]), axis=0).max() <= np.iinfo(pixels.dtype).max // FLAT)
        if enough and len(seen) - plain >= enough:
            break
    return Variety(sampled, len(seen), plain)


def sample_variety(source: ImageSource, seed: int) -> Variety:
    """Read a few random images, until most of them are known to differ."""
    chosen = source.sample(SAMPLED, seed)

    def readable() -> Iterator[Pixels]:
        for index in chosen.tolist():
            with suppress(UnreadableImage):
                yield source.read(index)

    return variety_of(readable(), enough=len(chosen) // 2 + 1)
