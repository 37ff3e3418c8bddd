"""Average precision as COCO defines it, by COCO's own code (pycocotools), and the masks that code can read."""

import contextlib
import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sslkit.errors import UserError
from sslkit.evaluate.detection.annotated_image import Picture

MEASURES = ("AP", "AP50", "AP75")
RECALLS = np.linspace(0, 1, 101)
RESAMPLES = 1000


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


@dataclass(frozen=True)
class Precision:
    """By name (see `MEASURES`), each in [0, 1]: the measures, and their bootstrap 95 % intervals over pictures."""

    measures: dict[str, float]
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Matched:
    """What COCO's matching said of one class, the surest detection first.

    Attributes:
        pictures: (D,) which picture each detection is in, from 0.
        right: (10, D) at each IoU threshold, whether it found an object that counts.
        wrong: (10, D) whether it found none; neither if what it found counts neither way.
        objects: (P,) objects that count, in each picture.
    """

    pictures: NDArray[np.int64]
    right: NDArray[np.bool_]
    wrong: NDArray[np.bool_]
    objects: NDArray[np.int64]


def average_precision(
    pictures: list[Picture], found: list[Found], classes: list[str], kind: Literal["bbox", "segm"] = "bbox"
) -> Precision:
    """AP over the IoU thresholds 0.50, 0.55 ... 0.95, AP50 and AP75, at most 100 detections a picture.

    Args:
        pictures: The truth. At least one object of one picture must count.
        found: One a picture.
        classes: Names behind the class numbers.
        kind: Whether boxes or masks overlap.
    """
    scored = _evaluated(pictures, found, classes, kind)
    if scored is None:
        return Precision(dict.fromkeys(MEASURES, 0.0), dict.fromkeys(MEASURES, (0.0, 0.0)))
    measures = {name: float(value) for name, value in zip(MEASURES, scored.stats[:3], strict=True)}
    return Precision(measures, bootstrap_precision(_matched(scored), len(pictures)))


def _evaluated(pictures: list[Picture], found: list[Found], classes: list[str], kind: str) -> Any:
    """COCO's own evaluation with its matches and figures; None where nothing was found."""
    detections = [row for number, each in enumerate(found, 1) for row in _detected(each, number, kind)]
    if not detections:
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _part("coco").COCO()
        truth.dataset = _truth(pictures, classes)
        truth.createIndex()
        scored = _part("cocoeval").COCOeval(truth, truth.loadRes(detections), kind)
        scored.computeIoU = partial(_overlaps, scored, scored.computeIoU)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return scored


def _overlaps(scored: Any, measure: Callable[[int, int], Any], image: int, category: int) -> Any:
    """COCO's overlaps of one picture and class, difficult objects (VOC) measured as objects, not as crowds.

    COCO has one flag for all that counts neither way, and of a crowd any part is enough. The flag stays up while
    matches are sought, so that a difficult object excuses every detection that overlaps it as far as the threshold.
    """
    objects = scored._gts[image, category]
    for each in objects:
        each["iscrowd"] = each["crowd"]
    overlaps = measure(image, category)
    for each in objects:
        each["iscrowd"] = each["ignore"]
    return overlaps


def bootstrap_precision(matched: list[Matched], pictures: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """The middle 95 % of each measure over `RESAMPLES` draws of as many pictures, with replacement.

    Which detection found which object is a matter within a picture, so that it is not found out again: a picture
    that is drawn twice counts twice.
    """
    rng = np.random.default_rng(seed)
    even = np.full(pictures, 1 / pictures)
    draws = [precision_of_draw(matched, rng.multinomial(pictures, even)) for _ in range(RESAMPLES)]
    measures = np.array([each for each in draws if each is not None])
    low, high = np.quantile(measures, [0.025, 0.975], axis=0)
    return {name: (float(low[place]), float(high[place])) for place, name in enumerate(MEASURES)}


def precision_of_draw(matched: list[Matched], times: NDArray[np.int64]) -> tuple[float, float, float] | None:
    """`MEASURES` of the data set that holds every picture so many times; None if no object in it counts.

    Args:
        matched: By class.
        times: (P,) how often each picture is there.
    """
    by_class = [_precision_of_class(each, times) for each in matched if times @ each.objects]
    if not by_class:
        return None
    of_threshold = np.mean(by_class, axis=0)
    return float(of_threshold.mean()), float(of_threshold[0]), float(of_threshold[5])


def _precision_of_class(matched: Matched, times: NDArray[np.int64]) -> NDArray[np.float64]:
    """(10,) means over 101 recalls of the best precision from there on, as COCO's `accumulate` has them."""
    weights = times[matched.pictures]
    right, wrong = np.cumsum(matched.right * weights, axis=1), np.cumsum(matched.wrong * weights, axis=1)
    recalls = right / (times @ matched.objects)
    precisions = right / np.maximum(right + wrong, 1)
    best = np.maximum.accumulate(precisions[:, ::-1], axis=1)[:, ::-1]
    best = np.concatenate([best, np.zeros((len(best), 1))], axis=1)  # recalls that are not reached
    return np.array([row[np.searchsorted(recall, RECALLS)].mean() for row, recall in zip(best, recalls, strict=True)])


def _matched(scored: Any) -> list[Matched]:
    """Of an evaluated COCOeval, whose rows are by class, then by range of areas (the first: all), then by picture."""
    pictures = len(scored.params.imgIds)
    step = len(scored.params.areaRng) * pictures
    return [_matched_class(scored.evalImgs[start : start + pictures]) for start in range(0, len(scored.evalImgs), step)]


def _matched_class(rows: list[Any]) -> Matched:
    """Rows are None for pictures with neither an object nor a detection of the class."""
    seen = [(place, row) for place, row in enumerate(rows) if row is not None]
    objects = np.zeros(len(rows), dtype=np.int64)
    for place, row in seen:
        objects[place] = len(row["gtIgnore"]) - np.count_nonzero(row["gtIgnore"])
    empty = np.zeros((10, 0), dtype=bool)
    found = np.concatenate([empty, *(row["dtMatches"] > 0 for _, row in seen)], axis=1)
    counts = ~np.concatenate([empty, *(row["dtIgnore"].astype(bool) for _, row in seen)], axis=1)
    places = np.repeat([place for place, _ in seen], [len(row["dtScores"]) for _, row in seen]).astype(np.int64)
    scores = np.concatenate([np.zeros(0), *(row["dtScores"] for _, row in seen)])
    order = np.argsort(-scores, kind="mergesort")  # as COCO sorts
    return Matched(places[order], (found & counts)[:, order], (~found & counts)[:, order], objects)


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
        raise UserError("detection needs pycocotools: pip install pycocotools") from error


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
                "crowd": int(picture.crowds[index]),  # not COCO's: see `_overlaps`
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
