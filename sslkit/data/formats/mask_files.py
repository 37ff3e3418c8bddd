"""Masks and other pictures that annotate images: their usual names, and those that lie beside their images."""

import os
import re
from collections import Counter

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import compute

from sslkit.data.formats.folder_listing import SPAN, printable

# Words in the names of columns and files.
ANNOTATIONS = frozenset(
    re.findall(
        "[a-z]+",
        "mask masks annotation annotations annot label labels seg segm segment segmentation segmentations "
        "semantic instance panoptic gt groundtruth truth depth normal normals edge edges flow heatmap "
        "saliency trimap alpha matte disparity thumbnail thumb overlay conditioning",
    )
)
# Words in the names of folders.
MASK_FOLDERS = frozenset(
    re.findall(
        "[a-z]+",
        "mask masks annotation annotations label labels gt groundtruth truth depth depths segmentation "
        "segmentations segmentationclass segmentationobject heatmaps",
    )
)
MASK_WORDS = ANNOTATIONS | MASK_FOLDERS
IMAGE_WORDS = frozenset(
    ("image", "images", "img", "rgb", "photo", "picture", "color", "colour", "sat", "orig", "original")
)
SEPARATORS = re.compile(r"[\W_]+")
# Matches every file name with such a word. Arrow searches a million names in a fraction of a second.
HAS_MASK_WORD = rf"(?i)(?:^|[^a-z])(?:{'|'.join(sorted(MASK_WORDS))})(?:[^a-z/][^/]*)?$"


def is_annotation(name: str) -> bool:
    """Whether a column or file is named like a mask, depth map, label or the like."""
    return not ANNOTATIONS.isdisjoint(re.findall("[a-z]+", name.lower()))


def is_mask_folder(name: str) -> bool:
    """Whether a folder is named like one of masks, depth maps or the like."""
    return not MASK_FOLDERS.isdisjoint(re.findall("[a-z]+", name.lower()))


def find_masks(paths: pa.ChunkedArray) -> NDArray[np.bool_] | None:
    """Find images that are masks or the like of other images in the same folder.

    A mask is named like its image with an additional word at the end or the beginning: ``001_mask.png``,
    ``001-seg_2.png`` or ``mask_001.png`` beside ``001.jpg``. They count only if most images of the folder, or of all
    folders, have one. Return a boolean for each of the (N) ``paths``, or None if there are no masks.
    """
    candidates = compute.match_substring_regex(pa.table([paths], ["path"]).combine_chunks()["path"], HAS_MASK_WORD)
    if not compute.any(candidates).as_py():
        return None
    keys = [_key(path) for path in paths.to_pylist()]
    images = {(folder, base) for folder, base, is_mask in keys if not is_mask}
    found = [index for index, (folder, base, is_mask) in enumerate(keys) if is_mask and (folder, base) in images]
    num_images = Counter(folder for folder, _ in images)
    num_masked = Counter(folder for folder, _ in {keys[index][:2] for index in found})
    most = 2 * num_masked.total() > num_images.total()
    masks = np.zeros(len(keys), bool)
    masks[[index for index in found if most or 2 * num_masked[keys[index][0]] > num_images[keys[index][0]]]] = True
    return masks if masks.any() else None


def describe_masks(paths: pa.ChunkedArray, masks: NDArray[np.bool_]) -> str:
    """A sentence on masks that are not read."""
    first = printable(os.path.basename(paths[int(masks.argmax())].as_py()))
    return (
        f'masks and the like beside images, left out: {int(masks.sum()):,}, such as {first}; split = "all" reads them'
    )


def _key(path: str) -> tuple[str, str, bool]:
    """Folder, name without the words for images and masks, and whether it has a word for masks."""
    folder, name = os.path.split(SPAN.sub("", path, count=1))
    words = list(filter(None, SEPARATORS.split(os.path.splitext(name)[0].lower())))
    if len(words) > 2 and words[-1].isdigit() and words[-2] in MASK_WORDS:  # one of several masks: 001_mask_2.png
        words = words[:-1]
    is_mask = len(words) > 1 and (words[-1] in MASK_WORDS or words[0] in MASK_WORDS)
    if is_mask:
        words = words[:-1] if words[-1] in MASK_WORDS else words[1:]
    if len(words) > 1 and words[-1] in IMAGE_WORDS:
        words = words[:-1]
    elif len(words) > 1 and words[0] in IMAGE_WORDS:
        words = words[1:]
    return folder, " ".join(words), is_mask
