"""VOC's difficult objects and COCO's crowds, which count neither way: against VOC's own rule, written out naively."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sslkit.evaluate.detection.annotated_image import AnnotatedImage
from sslkit.evaluate.detection.average_precision import Detections, average_precision

Boxes = NDArray[np.float64]


def picture_of(boxes: Boxes, ignored: list[bool], crowds: list[bool] | None = None) -> AnnotatedImage:
    placed = np.array(boxes, dtype=np.float64)
    crowded = np.array(crowds or [False] * len(boxes), dtype=bool)
    sizes = (placed[:, 2:] - placed[:, :2]).prod(axis=1)
    return AnnotatedImage(Path("x"), 640, 480, placed, np.ones(len(boxes), np.int64), np.array(ignored), crowded, sizes)


def found_of(boxes: Boxes, scores: Boxes) -> Detections:
    return Detections(
        np.array(boxes, dtype=np.float64), np.ones(len(boxes), np.int64), np.array(scores, dtype=np.float64)
    )


def overlap(first: Boxes, second: Boxes) -> float:
    common = np.prod(np.maximum(np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2]), 0))
    return float(common / (np.prod(first[2:] - first[:2]) + np.prod(second[2:] - second[:2]) - common))


def voc_precision(pictures: list[AnnotatedImage], found: list[Detections], threshold: float) -> float:
    """VOCevaldet.m for one class, but over 101 recalls: each detection against the object it overlaps most."""
    ranked = sorted((-score, number, row) for number, each in enumerate(found) for row, score in enumerate(each.scores))
    taken: set[tuple[int, int]] = set()
    hits = []
    for _, number, row in ranked:
        overlaps = [overlap(found[number].boxes[row], box) for box in pictures[number].boxes]
        best = int(np.argmax(overlaps))
        if overlaps[best] < threshold:
            hits.append(False)
        elif not pictures[number].ignored[best]:
            hits.append((number, best) not in taken)
            taken.add((number, best))
    true = np.cumsum(hits)
    recalls = true / sum(int((~picture.ignored).sum()) for picture in pictures)
    precisions = true / np.arange(1, len(hits) + 1)
    points = [max(precisions[recalls >= level - 1e-12], default=0.0) for level in np.linspace(0, 1, 101)]
    return float(np.mean(points))


@pytest.mark.parametrize("seed", range(3))
def test_difficult_objects_are_judged_by_vocs_rule(seed: int) -> None:
    """Objects lie apart, so that both rules for the choice among several objects agree."""
    rng = np.random.default_rng(seed)
    pictures, found = [], []
    for _ in range(15):
        corners = np.stack([20.0 + 150.0 * np.arange(4), rng.uniform(0, 300, 4)], axis=1)
        boxes = np.concatenate([corners, corners + rng.uniform(40, 140, (4, 2))], axis=1)
        near = np.repeat(boxes, 2, axis=0) + rng.normal(0, 8, (8, 4))  # some are found twice, difficult ones too
        parts = boxes[rng.integers(0, 4, 5)]  # and some detections are a small piece of an object
        parts[:, 2:] = parts[:, :2] + (parts[:, 2:] - parts[:, :2]) * rng.uniform(0.1, 1, (5, 2))
        pictures.append(picture_of(boxes, (rng.random(4) < 0.4).tolist()))
        found.append(found_of(np.concatenate([near, parts]), rng.random(13)))
    scored = average_precision(pictures, found, ["thing"])
    by_hand = [voc_precision(pictures, found, threshold) for threshold in np.arange(0.5, 1.0, 0.05)]
    assert 0.05 < by_hand[5] < by_hand[0] < 0.9
    assert scored.measures["AP"] == pytest.approx(np.mean(by_hand), abs=1e-9)
    assert (scored.measures["AP50"], scored.measures["AP75"]) == pytest.approx((by_hand[0], by_hand[5]), abs=1e-9)
    low, high = scored.intervals["AP50"]
    assert low < by_hand[0] < high


@pytest.mark.parametrize(("crowd", "precision"), [(False, 0.5), (True, 1.0)])
def test_a_piece_is_excused_by_a_crowd_but_not_by_a_difficult_object(crowd: bool, precision: float) -> None:
    boxes = np.array([[0.0, 0.0, 50.0, 50.0], [80.0, 80.0, 180.0, 180.0]])
    picture = picture_of(boxes, [False, True], [False, crowd])
    piece = np.array([[0.0, 0.0, 50.0, 50.0], [100.0, 100.0, 112.0, 112.0]])  # IoU 0.014, all of it inside
    scored = average_precision([picture], [found_of(piece, np.array([0.5, 0.9]))], ["thing"])
    assert scored.measures["AP"] == pytest.approx(precision)
    assert scored.intervals["AP"] == pytest.approx((precision, precision))
