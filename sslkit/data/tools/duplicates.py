"""Find images that occur more than once, exactly or nearly, in less than quadratic time."""

import cv2
import numpy as np
from numpy.typing import NDArray

NEAR = 3  # of 64 bits; compressed and rescaled copies of a photo differ in 0 to 2
BANDS = 4  # hashes that differ in 3 bits agree in at least one of 4 bands
WINDOW = 32  # neighbours, in the order of the rotated hash, that each hash is compared with
FLAT = 4  # difference of grey levels up to which an image is flat and its hash is noise


def difference_hash(pixels: NDArray[np.uint8]) -> int:
    """64-bit hash of (H, W, 3) uint8: whether each of 8 x 8 cells is darker than the next; 0 for a flat image."""
    grey = cv2.cvtColor(cv2.resize(pixels, (9, 8), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY).astype(int)
    if np.ptp(grey) <= FLAT:
        return 0
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def exact_groups(contents: NDArray[np.void]) -> list[NDArray[np.int64]]:
    """Positions of equal entries, one group for each that occurs more than once, in order of first occurrence."""
    _, ids = np.unique(contents, return_inverse=True)
    return _groups(ids)


def near_groups(hashes: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    """Positions of hashes that are connected by differences of at most `NEAR` bits. Flat images are in no group.

    A pair is compared if it agrees in one of `BANDS` bands of 16 bits. If more than `WINDOW` hashes agree in a band,
    only neighbours in sorted order are compared.
    """
    parent = np.arange(len(hashes))
    for band in range(BANDS):
        # Rotated, so that one sort orders by the band first and by the rest of the hash second.
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
    return _groups(np.array([_root(parent, index) for index in range(len(hashes))], dtype=np.int64))


def _root(parent: NDArray[np.int64], index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = int(parent[index])
    return index


def _join(parent: NDArray[np.int64], one: int, other: int) -> None:
    one, other = _root(parent, one), _root(parent, other)
    parent[max(one, other)] = min(one, other)


def _groups(ids: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    order = np.argsort(ids, kind="stable")
    starts = np.flatnonzero(np.diff(ids[order])) + 1
    groups = [np.sort(group) for group in np.split(order, starts) if len(group) > 1]
    return sorted(groups, key=lambda group: int(group[0]))
