"""Detection's data and its score: folders read exactly, COCO's average precision against its definition."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.errors import UserError
from sslkit.evaluate.detection.annotated_image import AnnotatedImage
from sslkit.evaluate.detection.annotations import open_annotated
from sslkit.evaluate.detection.average_precision import (
    MEASURES,
    Detections,
    _evaluate,
    _matches,
    average_precision,
    decode_mask,
    encode_mask,
    resampled_precision,
)
from sslkit.evaluate.detection.detect import evaluate_detect
from sslkit.evaluate.detection.detector_training import DetectProtocol

WRONG = np.array([[0.0, 300.0, 100.0, 420.0], [500.0, 300.0, 600.0, 400.0]])


@pytest.fixture(scope="module")
def scenes(garments: Any) -> list[Any]:
    """What the training split shows, drawn again."""
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="train"))
    known = sorted(set(source.labels()))[:2]
    source = source.subset(np.array([place for place, label in enumerate(source.labels()) if label in known]))
    labels, rng = source.labels(), np.random.default_rng([3, 0])
    return [garments.render_scene(source, labels, rng, 64) for _ in range(24)]


@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_a_folder_is_read_exactly(layout: str, rendered: Callable[[str], Path], scenes: list[Any]) -> None:
    pair = open_annotated(rendered(layout))
    assert pair.format == layout
    assert (len(pair.train), len(pair.test)) == (24, 6)
    assert len(pair.classes) == 2
    for picture, (scene, drawn) in zip(pair.train, scenes, strict=True):
        assert picture.boxes.tolist() == [list(garment.box) for garment in drawn]
        assert [pair.classes[label - 1] for label in picture.labels] == [garment.name for garment in drawn]
        assert np.abs(picture.pixels().astype(int) - scene.astype(int)).mean() < (4 if layout == "voc" else 1e-9)
        if layout == "coco":
            for segment, garment in zip(picture.segments, drawn, strict=True):
                np.testing.assert_array_equal(decode_mask(segment, *garment.mask.shape), garment.mask)


def test_coco_polygons_and_compressed_run_lengths() -> None:
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[4:10, 5:25] = 1
    np.testing.assert_array_equal(decode_mask([[5, 4, 25, 4, 25, 10, 5, 10]], 20, 30), mask)
    np.testing.assert_array_equal(decode_mask(encode_mask(mask), 20, 30), mask)
    with pytest.raises(UserError, match="neither polygons nor run lengths"):
        decode_mask({"size": [20, 30]}, 20, 30)


def test_other_layouts(rendered: Callable[[str], Path], tmp_path: Path) -> None:
    """VOCdevkit with years, COCO's images/SPLIT, and what labelling tools export."""
    for year in ("VOC2007", "VOC2012"):
        (tmp_path / "kit" / "VOCdevkit").mkdir(parents=True, exist_ok=True)
        (tmp_path / "kit" / "VOCdevkit" / year).symlink_to(rendered("voc"))
    assert len(open_annotated(tmp_path / "kit").train) == 48
    coco = rendered("coco")
    (tmp_path / "coco" / "images").mkdir(parents=True)
    (tmp_path / "coco" / "annotations").symlink_to(coco / "annotations")
    exported = tmp_path / "exported"
    for split, name in (("train", "train"), ("val", "valid")):
        (tmp_path / "coco" / "images" / split).symlink_to(coco / split)
        (exported / name).mkdir(parents=True)
        for file in (coco / split).iterdir():
            (exported / name / file.name).symlink_to(file)
        (exported / name / "_annotations.coco.json").symlink_to(coco / "annotations" / f"instances_{split}.json")
    for folder in (tmp_path / "coco", exported):
        assert [len(pictures) for pictures in (open_annotated(folder).train, open_annotated(folder).test)] == [24, 6]


def test_bad_folders_get_one_sentence(rendered: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        open_annotated(tmp_path / "none")
    with pytest.raises(UserError, match="has neither format"):
        open_annotated(tmp_path)
    with pytest.raises(UserError, match="has no split 'vall'; did you mean 'val'"):
        open_annotated(rendered("coco"), test_split="vall")
    with pytest.raises(UserError, match="name another split"):
        open_annotated(rendered("voc"), train_split="val")
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / "annotations" / f"instances_{split}.json").write_text('{"images": []}')
    with pytest.raises(
        UserError, match=r"instances_train\.json: is not a readable COCO annotation \(the file has no 'categories'\)"
    ):
        open_annotated(tmp_path)
    voc = tmp_path / "voc"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (voc / part).mkdir(parents=True)
    for split in ("train", "val"):
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text("0001\n")
    (voc / "Annotations" / "0001.xml").write_text("<annotation><size><width>5</width></size></annotation>")
    with pytest.raises(UserError, match=r"0001\.xml: is not a readable VOC annotation \(no <size><height>\)"):
        open_annotated(voc)
    with pytest.raises(UserError, match="boxes only"):
        evaluate_detect("test_resnet", rendered("voc"), DetectProtocol.from_name("voc"), masks=True)


BOX = {"xmin": "1", "ymin": "1", "xmax": "4", "ymax": "4"}


@pytest.mark.parametrize(
    ("size", "box", "sentence"),
    [
        ("5", {"xmax": "nan"}, r"a box of 0001 is \[0.0, 0.0, nan, 4.0\], not four finite numbers"),
        ("5", {"ymin": "-inf"}, "not four finite numbers"),
        ("5", {"xmin": "1e300"}, "not four finite numbers"),
        ("5", {"xmin": "6"}, "a box of 0001.png has a negative width or height"),
        ("inf", {}, "cannot convert float infinity to integer"),
        ("nan", {}, "cannot convert float NaN to integer"),
        ("0", {}, "the size of 0001.png is 0 x 5 pixels"),
    ],
)
def test_numbers_that_no_voc_picture_has(tmp_path: Path, size: str, box: dict[str, str], sentence: str) -> None:
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / part).mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / "ImageSets" / "Main" / f"{split}.txt").write_text("0001\n")
    (tmp_path / "JPEGImages" / "0001.png").touch()
    edges = "".join(f"<{edge}>{value}</{edge}>" for edge, value in (BOX | box).items())
    (tmp_path / "Annotations" / "0001.xml").write_text(
        f"<annotation><size><width>{size}</width><height>5</height></size>"
        f"<object><name>cat</name><bndbox>{edges}</bndbox></object></annotation>"
    )
    with pytest.raises(UserError, match=rf"0001\.xml: is not a readable VOC annotation \(.*{sentence}"):
        open_annotated(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=r"train\.txt: cannot be read as a list of images"):
        open_annotated(tmp_path)


@pytest.mark.parametrize(
    ("image", "thing", "sentence"),
    [
        ({}, {"bbox": [0, 0, float("nan"), 3]}, r"a box of 1\.png is \[0, 0, nan, 3\], not four finite numbers"),
        ({}, {"bbox": [0, 0, float("inf"), 3]}, "not four finite numbers"),
        ({}, {"bbox": [0, 0, 3, 3, 0, 0, 3, 3]}, "not four finite numbers"),
        ({}, {"bbox": [0, 0, -3, 3]}, r"a box of 1\.png has a negative width or height"),
        ({}, {"area": float("nan")}, r"an area of 1\.png is not between 0 and 1e\+10 square pixels"),
        ({}, {"area": -1}, r"an area of 1\.png is not between 0"),
        ({"width": float("inf")}, {}, r"width of images\[0\] is Infinity, not an integer"),
        ({"height": -5}, {}, r"the size of 1\.png is 5 x -5 pixels"),
    ],
)
def test_numbers_that_no_coco_picture_has(
    tmp_path: Path, image: dict[str, Any], thing: dict[str, Any], sentence: str
) -> None:
    (tmp_path / "1.png").touch()
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 5, "height": 5} | image],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 3, 3]} | thing],
    }
    for split in ("train", "val"):
        (tmp_path / f"instances_{split}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"instances_train\.json: is not a readable COCO annotation \(.*{sentence}"):
        open_annotated(tmp_path)


def picture_of(boxes: list[list[float]], ignored: list[bool] | None = None) -> AnnotatedImage:
    placed = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    flags = np.array(ignored or [False] * len(boxes), dtype=bool)
    sizes = (placed[:, 2:] - placed[:, :2]).prod(axis=1)
    labels = np.ones(len(boxes), dtype=np.int64)
    return AnnotatedImage(Path("none"), 640, 480, placed, labels, flags, np.zeros(len(boxes), dtype=bool), sizes)


def found_of(boxes: list[list[float]], scores: list[float]) -> Detections:
    return Detections(np.array(boxes, dtype=np.float64), np.ones(len(boxes), dtype=np.int64), np.array(scores))


def test_perfect_detections_have_a_precision_of_one(rendered: Callable[[str], Path]) -> None:
    pair = open_annotated(rendered("coco"))
    found = [
        Detections(picture.boxes, picture.labels, np.ones(len(picture.boxes)), [encode_mask(mask) for mask in masks])
        for picture in pair.test
        for masks in [[decode_mask(each, picture.height, picture.width) for each in picture.segments]]
    ]
    for kind in ("bbox", "segm"):
        assert average_precision(pair.test, found, pair.classes, kind).measures == {"AP": 1.0, "AP50": 1.0, "AP75": 1.0}
    none = [replace(each, boxes=each.boxes[:0], labels=each.labels[:0], scores=each.scores[:0]) for each in found]
    assert average_precision(pair.test, none, pair.classes).measures == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}


@pytest.mark.parametrize("shift", [5, 10, 20, 30, 40])
def test_shifted_boxes_have_the_precision_their_overlap_gives(shift: int) -> None:
    """A box of width w shifted by d overlaps by (w - d) / (w + d); it counts at every threshold up to that."""
    boxes = [[100.0, 50.0, 200.0, 150.0], [300.0, 200.0, 400.0, 420.0]]
    moved = [[left + shift, top, right + shift, bottom] for left, top, right, bottom in boxes]
    overlap = (100 - shift) / (100 + shift)
    precision = average_precision([picture_of(boxes)], [found_of(moved, [0.9, 0.8])], ["thing"]).measures
    thresholds = np.arange(0.5, 1.0, 0.05)
    assert precision["AP"] == pytest.approx((overlap >= thresholds).mean())
    assert (precision["AP50"], precision["AP75"]) == (overlap >= 0.5, overlap >= 0.75)


def overlap_of(first: list[float], second: list[float]) -> float:
    sides = [min(first[edge + 2], second[edge + 2]) - max(first[edge], second[edge]) for edge in (0, 1)]
    common = max(sides[0], 0) * max(sides[1], 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return common / (sum(areas) - common)


def precision_by_hand(truths: list[list[list[float]]], found: list[Detections], threshold: float) -> float:
    """One class: greedy matches in order of score, then the mean over 101 recalls of the best precision from there."""
    ranked = sorted(
        (-score, number, box)
        for number, each in enumerate(found)
        for score, box in zip(each.scores.tolist(), each.boxes.tolist(), strict=True)
    )
    taken: set[tuple[int, int]] = set()
    hits = []
    for _, number, box in ranked:
        free = [(overlap_of(box, truth), place) for place, truth in enumerate(truths[number])]
        best = max((each for each in free if (number, each[1]) not in taken), default=(0.0, -1))
        hits.append(best[0] >= threshold)
        if hits[-1]:
            taken.add((number, best[1]))
    true = np.cumsum(hits)
    recalls, precisions = true / sum(map(len, truths)), true / np.arange(1, len(hits) + 1)
    points = [max(precisions[recalls >= level - 1e-12], default=0.0) for level in np.linspace(0, 1, 101)]
    return float(np.mean(points))


def test_precision_is_cocos_definition() -> None:
    rng = np.random.default_rng(0)
    truths, found = [], []
    for _ in range(12):
        corners = np.stack([60.0 + 130.0 * np.arange(4), rng.uniform(0, 300, 4)], axis=1)
        boxes = np.concatenate([corners, corners + rng.uniform(40, 110, (4, 2))], axis=1)
        guesses = np.concatenate([boxes[:3] + rng.normal(0, 5, (3, 4)), WRONG + rng.uniform(0, 50, (2, 4))])
        truths.append(boxes.tolist())
        found.append(found_of(guesses.tolist(), rng.random(5).tolist()))
    precision = average_precision([picture_of(boxes) for boxes in truths], found, ["thing"]).measures
    by_hand = [precision_by_hand(truths, found, threshold) for threshold in np.arange(0.5, 1.0, 0.05)]
    assert 0.1 < by_hand[5] < by_hand[0] < 0.9
    assert precision["AP"] == pytest.approx(np.mean(by_hand), abs=1e-9)
    assert (precision["AP50"], precision["AP75"]) == pytest.approx((by_hand[0], by_hand[5]), abs=1e-9)


def test_a_difficult_object_is_neither_missed_nor_wrong() -> None:
    picture = picture_of([[0, 0, 100, 100], [200, 200, 300, 300]], ignored=[False, True])
    for boxes in ([[0, 0, 100, 100]], [[0, 0, 100, 100], [200, 200, 300, 300]]):
        scored = average_precision([picture], [found_of(boxes, [0.5, 0.9][: len(boxes)])], ["thing"])
        assert scored.measures["AP"] == pytest.approx(1.0)
        assert scored.intervals["AP"] == pytest.approx((1.0, 1.0))


def guessed_scenes(count: int) -> tuple[list[AnnotatedImage], list[Detections]]:
    """Three classes, one in few pictures; some objects difficult, some missed, some guesses wrong."""
    rng, pictures, found = np.random.default_rng(1), [], []
    for number in range(count):
        objects = 0 if number % 7 == 3 else 4
        corners = np.stack([60.0 + 130.0 * np.arange(objects), rng.uniform(0, 300, objects)], axis=1)
        boxes = np.concatenate([corners, corners + rng.uniform(40, 110, (objects, 2))], axis=1)
        labels = np.where(rng.random(objects) < 0.1, 3, rng.integers(1, 3, objects))
        picture = picture_of(boxes.tolist(), (rng.random(objects) < 0.2).tolist())
        pictures.append(replace(picture, labels=labels))
        guesses = np.concatenate([boxes[:3] + rng.normal(0, 6, boxes[:3].shape), WRONG + rng.uniform(0, 50, (2, 4))])
        guessed = np.concatenate([labels[:3], rng.integers(1, 4, 2)])
        found.append(Detections(guesses, guessed, rng.random(len(guesses))))
    return pictures, found


def test_a_drawn_set_scores_as_pycocotools_scores_it() -> None:
    pictures, found = guessed_scenes(25)
    names = ["shirt", "boot", "bag"]
    matched = _matches(_evaluate(pictures, found, names, "bbox"))
    rng = np.random.default_rng(2)
    for draw in [np.arange(25), *rng.integers(0, 25, (6, 25)), np.full(25, 3)]:
        drawn = average_precision_of_draw(pictures, found, names, draw)
        ours = resampled_precision(matched, np.bincount(draw, minlength=25))
        assert (ours is None) == (draw == 3).all(), "no object in a set of picture 3 alone"
        if ours is not None:
            assert ours == pytest.approx(drawn, abs=1e-9)


def average_precision_of_draw(
    pictures: list[AnnotatedImage], found: list[Detections], names: list[str], draw: Any
) -> tuple[float, ...]:
    """The drawn pictures really put together, the repeated ones too."""
    scored = _evaluate([pictures[each] for each in draw], [found[each] for each in draw], names, "bbox")
    return tuple(scored.stats[:3])


def test_intervals_are_the_middle_of_the_draws_and_shrink_with_more_pictures() -> None:
    widths = []
    for count in (20, 320):
        scored = average_precision(*guessed_scenes(count), ["shirt", "boot", "bag"])
        for name in MEASURES:
            low, high = scored.intervals[name]
            assert 0 <= low < scored.measures[name] < high <= 1
        widths.append(scored.intervals["AP50"][1] - scored.intervals["AP50"][0])
    assert 0.15 < widths[1] / widths[0] < 0.5, "a quarter, as 16 times the pictures have half the error twice over"


def test_without_pycocotools_one_sentence_says_what_to_install(
    rendered: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UserError, match=r"pip install pycocotools"):
        evaluate_detect("test_resnet", rendered("voc"), DetectProtocol.from_name("voc"))
