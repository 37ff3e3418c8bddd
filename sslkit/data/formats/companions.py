"""Masks and the like that lie beside their images under the same name and a word: ``001.jpg`` and ``001_mask.png``."""

import os
import re
from collections import Counter

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import compute

from sslkit.data.formats.columns import ANNOTATIONS
from sslkit.data.formats.folder_listing import PLACE, printable
from sslkit.data.formats.splits import DRAWN

WORDS = ANNOTATIONS | DRAWN
IMAGE_WORDS = frozenset(
    ("image", "images", "img", "rgb", "photo", "picture", "color", "colour", "sat", "orig", "original")
)
SEPARATORS = re.compile(r"[\W_]+")
# In every file name that has such a word; Arrow looks through a million names in a fraction of a second.
SIGN = rf"(?i)(?:^|[^a-z])(?:{'|'.join(sorted(WORDS))})(?:[^a-z/][^/]*)?$"


def companions(paths: pa.ChunkedArray) -> NDArray[np.bool_] | None:
    """Which images are masks and the like of other images in the same folder.

    One is if it is called as an image there and a word more, at the end or at the beginning (``001_mask.png``,
    ``001-seg_2.png`` or ``mask_001.png`` beside ``001.jpg``), and most images of the folder, or of all, have one.

    Args:
        paths: Paths of (N) images, or their places in tar files.

    Returns:
        (N) marks, or None if there are none.
    """
    marked = compute.match_substring_regex(pa.table([paths], ["path"]).combine_chunks()["path"], SIGN)
    if not compute.any(marked).as_py():
        return None
    keys = [_key(path) for path in paths.to_pylist()]
    owners = {(folder, base): index for index, (folder, base, is_companion) in enumerate(keys) if not is_companion}
    found = [index for index, (folder, base, drawn) in enumerate(keys) if drawn and (folder, base) in owners]
    there = Counter(folder for folder, _ in owners)
    with_one = Counter(folder for folder, _ in {keys[index][:2] for index in found})
    most = 2 * with_one.total() > there.total()
    marks = np.zeros(len(keys), bool)
    marks[[index for index in found if most or 2 * with_one[keys[index][0]] > there[keys[index][0]]]] = True
    return marks if marks.any() else None


def left_out(paths: pa.ChunkedArray, marks: NDArray[np.bool_]) -> str:
    """What is said of companions that are not read."""
    first = printable(os.path.basename(paths[int(marks.argmax())].as_py()))
    return (
        f'masks and the like beside images, left out: {int(marks.sum()):,}, such as {first}; split = "all" reads them'
    )


def _key(path: str) -> tuple[str, str, bool]:
    """Folder and name of an image without the words for images and for masks, and whether there is one for masks."""
    folder, name = os.path.split(PLACE.sub("", path, count=1))
    words = list(filter(None, SEPARATORS.split(os.path.splitext(name)[0].lower())))
    number = len(words) > 2 and words[-1].isdigit() and words[-2] in WORDS  # of several masks: 001_mask_2.png
    kept = words[:-1] if number else words
    is_companion = len(kept) > 1 and (kept[-1] in WORDS or kept[0] in WORDS)
    if is_companion:
        kept = kept[:-1] if kept[-1] in WORDS else kept[1:]
    if len(kept) > 1 and kept[-1] in IMAGE_WORDS:
        kept = kept[:-1]
    elif len(kept) > 1 and kept[0] in IMAGE_WORDS:
        kept = kept[1:]
    return folder, " ".join(kept), is_companion
