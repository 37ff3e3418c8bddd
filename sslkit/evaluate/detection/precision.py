"""Average precision as COCO defines it, by COCO's own code (pycocotools), and the masks that code can read."""

import contextlib
import importlib
import io
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sslkit.errors import UserError
from sslkit.evaluate.detection.picture import Picture

MEASURES = ("AP", "AP50", "AP75")


@dataclass(frozen=True)
class Found:
    """What a detector found in one picture.

    Attributes:
        boxes: (M, 4): left, top, right, bottom in pixels.
        labels: (M,) class numbers from 1.
        scores: (M,) the higher the surer.
        masks: M run lengths from `encode_mask`; empty for a detector of boxes.
    """

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    masks: list[Any] = field(default_factory=list)


def average_precision(
    pictures: list[Picture], found: list[Found], classes: list[str], kind: Literal["bbox", "segm"] = "bbox"
) -> dict[str, float]:
    """AP over the IoU thresholds 0.50, 0.55 ... 0.95, AP50 and AP75, each in [0, 1], at most 100 detections a picture.

    Args:
        pictures: The truth. At least one object of one picture must count.
        found: One a picture.
        classes: Names behind the class numbers.
        kind: Whether boxes or masks overlap.
    """
    detections = [row for number, each in enumerate(found, 1) for row in _detected(each, number, kind)]
    if not detections:
        return dict.fromkeys(MEASURES, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _part("coco").COCO()
        truth.dataset = _truth(pictures, classes)
        truth.createIndex()
        scored = _part("cocoeval").COCOeval(truth, truth.loadRes(detections), kind)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return {name: float(value) for name, value in zip(MEASURES, scored.stats[:3], strict=True)}


def decode_mask(segment: Any, height: int, width: int) -> NDArray[np.uint8]:
    """A segment of a COCO file as (height, width) of zeros and ones."""
    codec = _part("mask")
    try:
        if isinstance(segment, list):
            segment = codec.merge(codec.frPyObjects(segment, height, width))
        elif isinstance(segment["counts"], list):
            segment = codec.frPyObjects(segment, height, width)
        mask: NDArray[np.uint8] = codec.decode(segment)
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise UserError(f"--masks: a segmentation is neither polygons nor run lengths ({error})") from error
    return mask


def encode_mask(mask: NDArray[np.uint8]) -> Any:
    """(H, W) of zeros and ones as COCO's compressed run lengths."""
    return _part("mask").encode(np.asfortranarray(mask))


def require_pycocotools() -> None:
    """Raise `UserError` now, not after hours of training, if the extra is not installed."""
    _part("coco")


def _part(name: str) -> Any:
    try:
        return importlib.import_module(f"pycocotools.{name}")
    except ImportError as error:
        raise UserError("detection needs pycocotools: pip install 'sslkit[detect]'") from error


def _truth(pictures: list[Picture], classes: list[str]) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures, 1):
        images.append({"id": number, "width": picture.width, "height": picture.height})
        for index, (left, top, right, bottom) in enumerate(picture.boxes.tolist()):
            row = {
                # From 1: the reference code takes a match with object 0 for none.
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": int(picture.labels[index]),
                "bbox": [left, top, right - left, bottom - top],
                "area": float(picture.areas[index]),
                "iscrowd": int(picture.ignored[index]),
            }
            annotations.append(row | ({"segmentation": picture.segments[index]} if picture.segments else {}))
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    return {"images": images, "annotations": annotations, "categories": categories, "info": {}}


def _detected(found: Found, number: int, kind: str) -> list[dict[str, Any]]:
    rows = []
    for index, (left, top, right, bottom) in enumerate(found.boxes.tolist()):
        row = {"image_id": number, "category_id": int(found.labels[index]), "score": float(found.scores[index])}
        shape = {"bbox": [left, top, right - left, bottom - top]}
        rows.append(row | (shape if kind == "bbox" else {"segmentation": found.masks[index]}))
    return rows
