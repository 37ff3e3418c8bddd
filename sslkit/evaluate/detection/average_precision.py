"""COCO's average precision by its own code, pycocotools, with bootstrap intervals; and conversion of masks."""

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
from sslkit.evaluate.detection.annotated_image import AnnotatedImage
from sslkit.evaluate.verdict import QUANTILES

MEASURES = ("AP", "AP50", "AP75")
RECALLS = np.linspace(0, 1, 101)
RESAMPLES = 1000

Kind = Literal["bbox", "segm"]


@dataclass(frozen=True)
class Detections:
    """The M objects that a detector found in one image."""

    boxes: NDArray[np.float64]  # (M, 4): left, top, right, bottom in pixels
    labels: NDArray[np.int64]  # (M,) class numbers from 1
    scores: NDArray[np.float64]  # (M,) confidences
    masks: list[Any] = field(default_factory=list)  # M run lengths from `encode_mask`; empty for a detector of boxes


@dataclass(frozen=True)
class AveragePrecision:
    """The `MEASURES` by name, in [0, 1], and their values on resamples of the images, as of `bootstrap_precision`."""

    measures: dict[str, float]
    resamples: dict[str, NDArray[np.float64]]

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Bootstrap 95 % interval of each measure."""
        ends = {name: np.nanquantile(values, QUANTILES).tolist() for name, values in self.resamples.items()}
        return {name: (low, high) for name, (low, high) in ends.items()}


@dataclass(frozen=True)
class ClassMatches:
    """COCO's matches of the D detections of one class in P images, in the order of their scores, highest first."""

    images: NDArray[np.int64]  # (D,) image of each detection, from 0
    correct: NDArray[np.bool_]  # (10, D) at each IoU threshold, whether it matches an object that is scored
    wrong: NDArray[np.bool_]  # (10, D) whether it matches no object, not even an ignored one
    objects: NDArray[np.int64]  # (P,) number of scored objects in each image


def average_precision(
    images: list[AnnotatedImage], detections: list[Detections], classes: list[str], kind: Kind = "bbox"
) -> AveragePrecision:
    """AP over the IoU thresholds 0.50, 0.55 ... 0.95, AP50 and AP75, with at most 100 detections per image.

    ``images`` are the ground truth, with at least one scored object. ``kind`` is the overlap of boxes or of masks.
    """
    evaluated = _evaluate(images, detections, classes, kind)
    if evaluated is None:
        return AveragePrecision(dict.fromkeys(MEASURES, 0.0), dict.fromkeys(MEASURES, np.zeros(RESAMPLES)))
    measures = dict(zip(MEASURES, map(float, evaluated.stats[:3]), strict=True))
    return AveragePrecision(measures, bootstrap_precision(_matches(evaluated), len(images)))


def _evaluate(images: list[AnnotatedImage], detections: list[Detections], classes: list[str], kind: Kind) -> Any:
    """COCO's evaluation object; None if nothing was detected."""
    rows = [row for number, each in enumerate(detections, 1) for row in _detection_rows(each, number, kind)]
    if not rows:
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _pycocotools("coco").COCO()
        truth.dataset = _ground_truth(images, classes)
        truth.createIndex()
        evaluation = _pycocotools("cocoeval").COCOeval(truth, truth.loadRes(rows), kind)
        evaluation.computeIoU = partial(_compute_iou, evaluation, evaluation.computeIoU)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _compute_iou(evaluation: Any, compute_iou: Callable[[int, int], Any], image: int, category: int) -> Any:
    """COCO's overlaps of one image and class, with the IoU of objects for VOC's difficult objects.

    COCO has one flag, iscrowd, for all ignored objects, and any part of a crowd counts as an overlap. The flag is set
    again for the matching, so a difficult object excuses all detections that overlap it by the threshold.
    """
    objects = evaluation._gts[image, category]
    for each in objects:
        each["iscrowd"] = each["crowd"]
    overlaps = compute_iou(image, category)
    for each in objects:
        each["iscrowd"] = each["ignore"]
    return overlaps


def bootstrap_precision(matches: list[ClassMatches], num_images: int, seed: int = 0) -> dict[str, NDArray[np.float64]]:
    """Each measure on `RESAMPLES` resamples of the images, the same for every detector; NaN without a scored object.

    Matches are within an image, so they are computed once; an image drawn twice counts twice.
    """
    rng = np.random.default_rng(seed)
    uniform = np.full(num_images, 1 / num_images)
    resamples = [resampled_precision(matches, rng.multinomial(num_images, uniform)) for _ in range(RESAMPLES)]
    without = (np.nan,) * len(MEASURES)
    return dict(zip(MEASURES, np.array([each or without for each in resamples]).T, strict=True))


def resampled_precision(matches: list[ClassMatches], counts: NDArray[np.int64]) -> tuple[float, float, float] | None:
    """The `MEASURES` of a resample with image ``i`` drawn ``counts[i]`` times; None if it has no scored object."""
    by_class = [_class_precision(each, counts) for each in matches if counts @ each.objects]
    if not by_class:
        return None
    by_threshold = np.mean(by_class, axis=0)
    return float(by_threshold.mean()), float(by_threshold[0]), float(by_threshold[5])


def _class_precision(matches: ClassMatches, counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(10,) interpolated precision, averaged over 101 recalls, as in COCO's ``accumulate``."""
    weights = counts[matches.images]
    correct, wrong = np.cumsum(matches.correct * weights, axis=1), np.cumsum(matches.wrong * weights, axis=1)
    recalls = correct / (counts @ matches.objects)
    precisions = correct / np.maximum(correct + wrong, 1)
    best = np.maximum.accumulate(precisions[:, ::-1], axis=1)[:, ::-1]
    best = np.concatenate([best, np.zeros((len(best), 1))], axis=1)  # 0 at recalls that are not reached
    return np.array([row[np.searchsorted(recall, RECALLS)].mean() for row, recall in zip(best, recalls, strict=True)])


def _matches(evaluated: Any) -> list[ClassMatches]:
    """Matches from a COCOeval, whose rows are sorted by class, range of areas (the first is all) and image."""
    num_images = len(evaluated.params.imgIds)
    step = len(evaluated.params.areaRng) * num_images
    rows = evaluated.evalImgs
    return [_class_matches(rows[start : start + num_images]) for start in range(0, len(rows), step)]


def _class_matches(rows: list[Any]) -> ClassMatches:
    """Rows are None for images with neither an object nor a detection of the class."""
    present = [(image, row) for image, row in enumerate(rows) if row is not None]
    objects = np.zeros(len(rows), dtype=np.int64)
    for image, row in present:
        objects[image] = len(row["gtIgnore"]) - np.count_nonzero(row["gtIgnore"])
    empty = np.zeros((10, 0), dtype=bool)
    matched = np.concatenate([empty, *(row["dtMatches"] > 0 for _, row in present)], axis=1)
    scored = ~np.concatenate([empty, *(row["dtIgnore"].astype(bool) for _, row in present)], axis=1)
    images = np.array([image for image, row in present for _ in row["dtScores"]], dtype=np.int64)
    scores = np.concatenate([np.zeros(0), *(row["dtScores"] for _, row in present)])
    order = np.argsort(-scores, kind="mergesort")  # COCO's order
    return ClassMatches(images[order], (matched & scored)[:, order], (~matched & scored)[:, order], objects)


def decode_mask(segment: Any, height: int, width: int) -> NDArray[np.uint8]:
    """Convert a segmentation of a COCO file to (height, width) of zeros and ones."""
    codec = _pycocotools("mask")
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
    """Convert (H, W) of zeros and ones to COCO's compressed run lengths."""
    return _pycocotools("mask").encode(np.asfortranarray(mask))


def require_pycocotools() -> None:
    """Raise `UserError` if pycocotools is not installed."""
    _pycocotools("coco")


def _pycocotools(module: str) -> Any:
    try:
        return importlib.import_module(f"pycocotools.{module}")
    except ImportError as error:
        raise UserError("detection needs pycocotools: pip install pycocotools") from error


def _ground_truth(images: list[AnnotatedImage], classes: list[str]) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(images, 1):
        for index, box in enumerate(_to_widths(image.boxes)):
            row = {
                "id": len(annotations) + 1,  # from 1: COCO's code takes a match with object 0 for no match
                "image_id": number,
                "category_id": int(image.labels[index]),
                "bbox": box,
                "area": float(image.areas[index]),
                "iscrowd": int(image.ignored[index]),
                "crowd": int(image.crowds[index]),  # not a key of COCO; see `_compute_iou`
            }
            annotations.append(row | ({"segmentation": image.segments[index]} if image.segments else {}))
    image_rows = [{"id": number, "width": each.width, "height": each.height} for number, each in enumerate(images, 1)]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    return {"images": image_rows, "annotations": annotations, "categories": categories, "info": {}}


def _detection_rows(detections: Detections, number: int, kind: Kind) -> list[dict[str, Any]]:
    key, shapes = ("bbox", _to_widths(detections.boxes)) if kind == "bbox" else ("segmentation", detections.masks)
    columns = zip(detections.labels.tolist(), detections.scores.tolist(), shapes, strict=True)
    return [{"image_id": number, "category_id": label, "score": score, key: shape} for label, score, shape in columns]


def _to_widths(boxes: NDArray[np.float64]) -> list[list[float]]:
    """From left, top, right, bottom to left, top, width, height."""
    rows: list[list[float]] = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
    return rows
