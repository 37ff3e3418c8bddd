"""Folders that `eval detect` must refuse before it trains, each by one sentence of the real command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import cli_error
from PIL import Image

from sslkit.evaluate.detection.annotated_image import AnnotatedImage
from sslkit.evaluate.detection.annotations import open_annotated
from sslkit.evaluate.detection.average_precision import decode_mask, encode_mask
from sslkit.evaluate.detection.masks import check_masks

Content = dict[str, Any]
SQUARE = [1, 1, 9, 1, 9, 9, 1, 9]


def refusal(folder: Path, *options: str) -> str:
    """The model is one that cannot be loaded here: what is said before, is said before the training."""
    return cli_error(["eval", "detect", "no_such_model", "--data", str(folder), *options])


@pytest.fixture
def coco(rendered: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered("coco"), tmp_path / "coco"))


@pytest.fixture
def voc(rendered: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered("voc"), tmp_path / "voc"))


def edit(folder: Path, split: str, change: Callable[[Content], Any]) -> None:
    file = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_folder_without_fault_is_not_refused(coco: Path, voc: Path) -> None:
    for folder, options in ((coco, ["--masks"]), (voc, [])):
        assert refusal(folder, *options).startswith("sslkit: no_such_model: is not a run folder")


def test_a_test_split_without_an_object_that_counts(coco: Path, voc: Path) -> None:
    for split in ("train", "val"):
        for file in (voc / "Annotations").glob(f"{split}*.xml"):
            file.write_text(file.read_text().replace("<difficult>0", "<difficult>1"))
        edit(coco, split, lambda content: [row.update(iscrowd=1) for row in content["annotations"]])
    sentence = "split 'val' has no object to score; all are difficult, crowds or have no area"
    assert refusal(voc).endswith(sentence)  # not train: difficult objects are learned from
    assert refusal(coco).endswith("split 'train' has no object to train on; all are crowds or have no area")
    edit(coco, "train", lambda content: content["annotations"][0].update(iscrowd=0))
    assert refusal(coco).endswith(sentence)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("segment", "fault"),
    [
        *((each, "has a polygon that is not a list of 6 or more") for each in ([[1, 2]], [SQUARE[:4]], [SQUARE[:7]])),
        *((each, "has a polygon that is not a list of 6 or more") for each in (SQUARE, [SQUARE, []], [[True] * 6])),
        ([[float("nan"), *SQUARE[1:]]], "has a polygon"),
        ([[*SQUARE[:7], float("nan")]], "has a polygon"),
        ([[1e300, *SQUARE[1:]]], "of at most 1e6 pixels"),
        ([["1", "1", "9", "1", "9", "9"]], "has a polygon"),
        ("abc", "is neither a list of polygons nor run lengths with size and counts"),
        (7, "is neither a list of polygons"),
        ({"size": [64, 80]}, "is neither a list of polygons"),
        ({"size": [80, 64], "counts": [5120]}, "has another size than its image, which is [64, 80]"),
        ({"size": [64, 80], "counts": [20, 5101]}, "do not add up to the 5120 pixels of its image"),
        ({"size": [64, 80], "counts": [5121, -1]}, "do not add up"),
        ({"size": [64, 80], "counts": []}, "has counts that are neither a list of integers nor COCO's"),
        ({"size": [64, 80], "counts": [20.5, 5099.5]}, "has counts"),
        ({"size": [64, 80], "counts": None}, "has counts"),
        ({"size": [64, 80], "counts": "0"}, "do not add up"),
        ({"size": [64, 80], "counts": "oo"}, "has counts"),
        ({"size": [64, 80], "counts": "oooooooooooooooo0"}, "has counts"),
        ({"size": [64, 80], "counts": "\u00e9"}, "has counts"),
        (None, "has objects without a segmentation"),
    ],
)
def test_broken_segmentations(coco: Path, split: str, segment: Any, fault: str) -> None:
    edit(coco, split, lambda content: content["annotations"][-1].update(segmentation=segment))
    said = refusal(coco, "--masks")
    assert fault in said
    assert f"/{split}/" in said, "which image"
    assert "no_such_model" in refusal(coco), "who learns boxes only needs no masks"


def test_compressed_masks_are_believed_where_pycocotools_reads_them() -> None:
    rng = np.random.default_rng(0)
    for number in range(60):
        height, width = (int(side) for side in rng.integers(1, 90, 2))
        mask = (rng.random((height, width)) < rng.choice([0, 0.02, 0.5, 1])).astype(np.uint8)
        if number % 2:  # long runs, whose differences have several digits and either sign
            mask = np.repeat(np.repeat(mask, 40, axis=0), 7, axis=1)
        encoded = encode_mask(mask)
        segment = {"size": list(mask.shape), "counts": encoded["counts"].decode()}
        one = (np.array([[0.0, 0.0, 1.0, 1.0]]), np.ones(1, np.int64), np.zeros(1, bool), np.zeros(1, bool), np.ones(1))
        check_masks([AnnotatedImage(Path("x"), mask.shape[1], mask.shape[0], *one, (segment,))])
        np.testing.assert_array_equal(decode_mask(segment, *mask.shape), mask)


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_pictures_are_counted(coco: Path, split: str) -> None:
    lost = sorted((coco / split).iterdir())[:2]
    lost[0].unlink()
    lost[1].unlink()
    lost[1].symlink_to(coco / "nowhere.png")
    total = {"train": 24, "val": 6}[split]
    sentence = f"2 of its {total} images are not in {coco / split}, such as {lost[0].name}; add"
    assert sentence in refusal(coco)
    shutil.rmtree(coco / split)
    assert f"such as {lost[0].name}, is in {coco / split} or " in refusal(coco)


def test_pictures_in_folders_of_folders_are_found(coco: Path) -> None:
    (coco / "val").rename(coco / "deep")
    edit(coco, "val", lambda content: [row.update(file_name=f"deep/{row['file_name']}") for row in content["images"]])
    assert all(picture.file.is_file() for picture in open_annotated(coco).test)


def turn(file: Path, width: int, height: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (width, height)).save(file, exif=exif)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_sizes_are_judged_by_headers(coco: Path, split: str, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = coco / split / f"turned{suffix}"
    edit(coco, split, lambda content: content["images"][1].update(file_name=file.name))
    turn(file, 80, 64)
    cause = "the annotation probably ignores its EXIF rotation: annotate the rotated image or remove the tag"
    assert refusal(coco).endswith(f"{file}: is 64 x 80 pixels, but its annotation says 80 x 64; {cause}")
    Image.new("RGB", (64, 80)).save(file)
    assert refusal(coco).endswith(f"{file}: is 64 x 80 pixels, but its annotation says 80 x 64")
    file.write_bytes(file.read_bytes()[:40])
    assert f"cannot read {file} as an image" in refusal(coco)
    turn(file, 64, 80)
    monkeypatch.setattr(AnnotatedImage, "pixels", lambda self: pytest.fail("decoded"))
    assert "no_such_model" in refusal(coco), "upright it has its size, and nothing was decoded to know that"


def test_lists_and_annotations_may_begin_with_a_byte_order_mark(coco: Path, voc: Path) -> None:
    before = [open_annotated(folder) for folder in (coco, voc)]
    for file in [*(voc / "ImageSets" / "Main").iterdir(), *(coco / "annotations").iterdir()]:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    for folder, kept in zip((coco, voc), before, strict=True):
        pair = open_annotated(folder)
        assert [picture.file for picture in pair.train] == [picture.file for picture in kept.train]
        assert pair.description == kept.description


NAN = float("nan")


@pytest.mark.parametrize(
    ("table", "fields", "fault"),
    [
        *(("images", {"id": value}, "id of images[0] is ") for value in ("1", None, NAN, True, 1.5, [])),
        *(("images", {"width": value}, "width of images[0] is ") for value in ("80", None, NAN, True, 80.5)),
        *(("images", {"height": value}, "height of images[0] is ") for value in ("64", None, NAN, True, {})),
        *(("images", {"file_name": value}, "file_name of images[0] is ") for value in (None, 7, NAN, True, "", ["a"])),
        *(("categories", {"id": value}, "id of categories[0] is ") for value in ("1", None, NAN, True)),
        *(("categories", {"name": value}, "name of categories[0] is ") for value in (None, 7, NAN, True)),
        *(("annotations", {"image_id": each}, "image_id of annotations[0] is ") for each in ("0", None, NAN, False)),
        *(("annotations", {"category_id": each}, "category_id of annotations[0] is ") for each in ("1", None, True)),
        *(("annotations", {"bbox": each}, "not four finite numbers") for each in ("abc", None, True, 3, {}, [])),
        *(("annotations", {"bbox": [1, 1, 9, each]}, "not four finite numbers") for each in ("9", None, NAN, True)),
        *(("annotations", {"iscrowd": value}, "iscrowd of annotations[0] is ") for value in ("0", None, NAN, 2)),
        *(("annotations", {"area": value}, "area of annotations[0] is ") for value in ("9", None, True)),
        ("annotations", {"category_id": 99}, "annotations[0] has the unknown category 99"),
        ("annotations", {"image_id": 99}, "annotations[0] has the unknown image 99"),
        ("annotations", {"category_id": 10**40}, "annotations[0] has the unknown category 1"),
        ("annotations", {"area": 10**400}, "too large"),
        ("images", {"id": 1}, "two images have the same id"),
        ("categories", {"id": 4}, "two categories have the same id"),
    ],
)
def test_fields_of_a_wrong_type(coco: Path, table: str, fields: Content, fault: str) -> None:
    edit(coco, "val", lambda content: content[table][0].update(fields))
    said = refusal(coco)
    assert "instances_val.json: is not a readable COCO annotation (" in said
    assert fault in said


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([], "the file is not an object with images, annotations and categories"),
        ({"categories": []}, "the file has no 'images'"),
        ({"categories": [], "images": 5}, "images is 5, not a list"),
        ({"categories": [], "images": [None]}, "images[0] is null, not an object"),
        ({"categories": [], "images": [{"id": 1}], "annotations": []}, "images[0] has no 'file_name'"),
        ({"categories": [], "images": [], "annotations": []}, "it lists no images"),
    ],
)
def test_files_of_a_wrong_shape(coco: Path, content: Any, fault: str) -> None:
    (coco / "annotations" / "instances_train.json").write_text(json.dumps(content))
    assert refusal(coco).endswith(f"instances_train.json: is not a readable COCO annotation ({fault})")


def test_categories_that_only_one_split_lists(coco: Path) -> None:
    classes = open_annotated(coco).classes
    edit(coco, "val", lambda content: content["categories"].insert(0, {"id": 70, "name": "a thing"}))
    edit(coco, "train", lambda content: content["categories"].append({"id": 71, "name": "zebra"}))
    pair = open_annotated(coco)
    assert pair.classes == [*classes, "zebra"], "what is learned from says what there is to find"
    assert {pair.classes[label - 1] for picture in pair.test for label in picture.labels} == set(classes)
    edit(coco, "val", lambda content: content["annotations"][0].update(category_id=70))
    assert refusal(coco).endswith("val: has objects of category 'a thing', which train does not list")


@pytest.mark.parametrize(
    ("category", "fault"),
    [
        ({"name": "gown"}, "val: category 1 is 'gown', but {name!r} in train; use one name"),
        ({"id": 90}, "val: category {name!r} has id 90, but 1 in train; use one id"),
    ],
)
def test_categories_that_contradict(coco: Path, category: Content, fault: str) -> None:
    name = open_annotated(coco).classes[0]
    edit(coco, "val", lambda content: content.update(annotations=[content["annotations"][0] | {"category_id": 4}]))
    edit(coco, "val", lambda content: content["categories"][0].update(category))
    assert refusal(coco).endswith(fault.format(name=name))
