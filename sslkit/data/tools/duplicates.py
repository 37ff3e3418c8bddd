"""Images that occur more than once, byte for byte or nearly so, in time that does not grow with the square."""

import cv2
import numpy as np
from numpy.typing import NDArray

NEAR = 3  # of 64 bits; recompressed and rescaled copies of a photo differ in 0 to 2
BANDS = 4  # hashes that differ in three bits agree in at least one of four bands
WINDOW = 32  # in a crowded band, so many neighbours in the order of the whole hash are compared
FLAT = 4  # grey levels between the darkest and the brightest cell, up to which a hash is noise


def difference_hash(pixels: NDArray[np.uint8]) -> int:
    """64 bits: whether each of 8 x 8 cells is darker than its right neighbour; 0 for a flat image.

    Args:
        pixels: (H, W, 3) uint8 RGB.
    """
    grey = cv2.cvtColor(cv2.resize(pixels, (9, 8), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY).astype(int)
    if np.ptp(grey) <= FLAT:
        return 0
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def exact_groups(contents: NDArray[np.void]) -> list[NDArray[np.int64]]:
    """Positions of equal entries, a group for each that occurs more than once, in order of first occurrence."""
    _, groups = np.unique(contents, return_inverse=True)
    return _of_several(groups)


def near_groups(hashes: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    """Positions of hashes that differ in at most `NEAR` bits, directly or by steps. Flat images are in no group.

    Every pair that shares a band of 16 bits with fewer than `WINDOW` others is compared; in a more crowded band, those
    that are close in order.
    """
    parent = np.arange(len(hashes))
    for band in range(BANDS):
        # The band first, then the rest of the hash: rotated, one sort does both.
        shift = np.uint64(16 * band)
        turned = (hashes << shift) | (hashes >> (np.uint64(64) - shift)) if band else hashes
        order = np.argsort(turned, kind="stable")
        for step in range(1, min(WINDOW, len(order) - 1) + 1):
            left, right = order[:-step], order[step:]
            near = (turned[left] >> np.uint64(48)) == (turned[right] >> np.uint64(48))
            near &= np.bitwise_count(hashes[left] ^ hashes[right]) <= NEAR
            near &= (hashes[left] != 0) & (hashes[right] != 0)
            for one, other in zip(left[near].tolist(), right[near].tolist(), strict=True):
                _join(parent, one, other)
    return _of_several(np.array([_root(parent, place) for place in range(len(hashes))], dtype=np.int64))


def _root(parent: NDArray[np.int64], place: int) -> int:
    while parent[place] != place:
        parent[place] = parent[parent[place]]
        place = int(parent[place])
    return place


def _join(parent: NDArray[np.int64], one: int, other: int) -> None:
    one, other = _root(parent, one), _root(parent, other)
    parent[max(one, other)] = min(one, other)


def _of_several(groups: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    several = [np.sort(group) for group in np.split(order, starts) if len(group) > 1]
    return sorted(several, key=lambda group: int(group[0]))
