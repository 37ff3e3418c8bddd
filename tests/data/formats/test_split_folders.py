"""Splits of image folders: layouts, folders of masks, links; no held-out image is trained on."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from layouts import count, make, write_tables

from sslkit.data.sources.image_source import DataConfig, available_splits, open_source
from sslkit.errors import UserError
from sslkit.evaluate.labelled_data import open_pair

LAYOUTS = {
    "roboflow": {"train/cat": 3, "train/dog": 2, "valid/cat": 1, "valid/dog": 1, "test/cat": 2},
    "roboflow yolo": {"train/images": 5, "train/labels/a.txt": 1, "valid/images": 2, "test/images": 2, "r.txt": 1},
    "yolo": {"images/train": 5, "images/val": 2, "images/test": 2, "labels/train/a.txt": 1},
    "capitals": {"Training/cat": 5, "Validation/cat": 2, "Testing/cat": 2},
    "coco": {"train2017": 5, "val2017": 2, "test2017": 2, "annotations/a.txt": 1},
    "class first": {"cat/train": 3, "cat/valid": 1, "cat/test": 1, "dog/train": 2, "dog/valid": 1, "dog/test": 1},
    "one folder deeper": {"archive/train/cat": 5, "archive/dev/cat": 2, "archive/eval/cat": 2},
    "a picture beside": {"train": 5, "val": 2, "test": 2, ".": 1},
}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_classes_in_folders_by_letter(kind: str, tmp_path: Path) -> None:
    """As Places has them: names below ``t`` have words of splits, but nobody means a split by them."""
    classes = {"a/airport": 3, "t/test_kitchen": 2, "t/train_station": 1}
    make(tmp_path / "set", classes)
    if kind == "tar":
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.add(tmp_path / "set", "set")
        assert count(tmp_path / "a.tar") == 6
        return
    assert open_source(DataConfig(path=str(tmp_path / "set"))).labels() == [
        *["airport"] * 3, *["test_kitchen"] * 2, "train_station"
    ]  # fmt: skip
    make(tmp_path / "set", {"a/test": 2, "a/train": 2})
    with pytest.raises(UserError, match="folders of splits and others"):
        count(tmp_path / "set")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_image_folders(layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, LAYOUTS[layout])
    with caplog.at_level("INFO", "sslkit.data"):
        assert count(tmp_path) == 5
    assert ("beside the folders of the splits, left out: 1" in caplog.text) == (layout == "a picture beside")
    assert [count(tmp_path, split) for split in ("train", "validation", "test")] == [5, 2, 2]
    assert count(tmp_path, "all") == 9 + (layout == "a picture beside")
    assert len(available_splits(DataConfig(path=str(tmp_path)))) == 3


def test_classes_of_a_layout_are_the_folders_of_the_split_or_around_it(tmp_path: Path) -> None:
    pair = open_pair(DataConfig(path=str(make(tmp_path / "a", LAYOUTS["class first"]))))
    assert (pair.split, pair.classes, len(pair.train), len(pair.test)) == ("train / test", ["cat", "dog"], 5, 2)
    pair = open_pair(DataConfig(path=str(make(tmp_path / "b", LAYOUTS["roboflow"]))))
    assert (pair.split, pair.classes, len(pair.train), len(pair.test)) == ("train / test", ["cat", "dog"], 5, 2)
    assert open_source(DataConfig(path=str(make(tmp_path / "c", LAYOUTS["yolo"])))).label_column is None


@pytest.mark.parametrize(
    "files",
    [
        {"train": 2, "cats": 1, "dogs": 1},
        {"cat/train": 2, "cat/test": 1, "dog": 3},
        {"photos/train": 2, "photos/test": 1, "others": 3},
        {"photos/train": 2, "photos/b/c": 2},
    ],
)
def test_where_only_some_folders_name_a_split_the_way_out_works(files: dict[str, int], tmp_path: Path) -> None:
    make(tmp_path, files)
    with pytest.raises(UserError, match=r"folders of splits and others.*name the folder to read") as caught:
        count(tmp_path)
    named = str(caught.value).partition("such as '")[2].partition("'")[0]
    assert count(Path(named)) == files[os.path.relpath(named, tmp_path)]
    assert count(tmp_path, "all") == sum(files.values())


def test_a_test_folder_among_classes(tmp_path: Path) -> None:
    make(tmp_path, {"cats": 3, "dogs": 2, "test": 2})
    with pytest.raises(
        UserError, match=r"splits \['test'\], others \['cats', 'dogs'\]; move the others into .*/train'"
    ):
        count(tmp_path)
    (tmp_path / "train").mkdir()
    for name in ("cats", "dogs"):
        (tmp_path / name).rename(tmp_path / "train" / name)
    assert (count(tmp_path), count(tmp_path, "test")) == (5, 2)


def link_loop(root: Path) -> None:
    (root / "train" / "loop").symlink_to("..")


def link_folder(root: Path) -> None:
    (root / "train" / "more").symlink_to("../test")


def link_class(root: Path) -> None:
    (root / "train" / "more").symlink_to(root / "test" / "cat")


def link_file(root: Path) -> None:
    (root / "train" / "cat" / "x.png").symlink_to("../../test/cat/0.png")


def link_chain(root: Path) -> None:
    (root / "elsewhere.png").symlink_to(root / "test" / "cat" / "0.png")
    (root / "train" / "cat" / "x.png").symlink_to(root / "elsewhere.png")


def link_over(root: Path) -> None:
    (root.parent / "outside").mkdir()
    (root.parent / "outside" / "way").symlink_to(root / "test")
    (root / "train" / "out").symlink_to(root.parent / "outside")


def link_whole(root: Path) -> None:
    os.rename(root / "train", root / "old")
    (root / "train").symlink_to("test")
    for file in (root / "old").rglob("*.png"):
        file.unlink()


@pytest.mark.parametrize(
    ("link", "refused"),
    [
        (link_loop, False),
        (link_folder, True),
        (link_class, True),
        (link_file, True),
        (link_chain, True),
        (link_over, True),
        (link_whole, True),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_links_bring_no_held_out_image_into_training(
    link: Callable[[Path], None], refused: bool, inside: bool, tmp_path: Path
) -> None:
    root = make(tmp_path / "set", {"train/cat": 3, "train/dog": 2, "test/cat": 4})
    link(root)
    place = root / "train" if inside else root
    if refused and not (inside and link is link_whole):
        with pytest.raises(UserError, match=r"is a link into .*another split; remove the link"):
            count(place)
        if link is not link_whole:
            linked = next(each for each in (root / "train").rglob("*") if each.is_symlink())
            linked.unlink()
            assert count(place) == 5
    elif not refused:
        assert count(place) == 5
    if not inside:
        assert count(root, "test") == 4


def test_links_that_stay_within_the_rules(tmp_path: Path) -> None:
    """A validation set that is the training set is the user's business, and so is a class that lies elsewhere."""
    root = make(tmp_path / "set", {"train/cat": 3})
    (root / "val").symlink_to("train")
    assert (count(root), count(root, "val")) == (3, 3)
    other = make(tmp_path / "other", {"dog": 2})
    (root / "train" / "dog").symlink_to(other / "dog")
    (other / "dog" / "x.png").symlink_to(root / "train" / "cat" / "0.png")
    assert count(root) == 6


def test_links_from_folder_to_folder_end(tmp_path: Path) -> None:
    root = make(tmp_path, {str(number): 1 for number in range(8)})
    for one in range(8):
        for other in range(8):
            if one != other:
                (root / str(one) / f"to{other}").symlink_to(root / str(other))
    with pytest.raises(UserError, match="remove links between folders"):
        count(root)


def test_tables_that_are_links_to_another_split(tmp_path: Path) -> None:
    write_tables(tmp_path, {"train/0": 3, "test/0": 2}, "parquet")
    (tmp_path / "train" / "1.parquet").symlink_to(tmp_path / "test" / "0.parquet")
    with pytest.raises(UserError, match=r"is a link to .* of another split"):
        count(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"images": 4, "masks": 3}, 4),
        ({"JPEGImages": 4, "SegmentationClass": 3, "SegmentationObject": 3}, 4),
        ({"train/images": 4, "train/masks": 3, "test/images": 2, "test/masks": 2}, 4),
        ({"train": 4, "train_masks": 3, "test": 2}, 4),
        ({"bottle/train/good": 4, "bottle/test/good": 2, "bottle/test/hole": 2, "bottle/ground_truth/hole": 2}, 4),
        ({"with_mask": 4, "without_mask": 3}, 7),  # classes
        ({"NORMAL": 4, "PNEUMONIA": 3}, 7),
        ({"masks": 4}, 4),
        ({"cat/masks": 4, "cat/others": 3}, 7),
    ],
)
def test_masks_beside_images_are_left_out_aloud(
    files: dict[str, int], expected: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, files)
    with caplog.at_level("INFO", "sslkit.data"):
        assert count(tmp_path) == expected
    assert ("masks and the like beside images, left out" in caplog.text) == (expected == 4 and len(files) > 1)
    assert count(tmp_path, "all") == sum(files.values())


def test_a_split_below_other_folders_has_no_class_of_their_name(tmp_path: Path) -> None:
    make(tmp_path, {"ILSVRC/CLS-LOC/train/n01": 3, "ILSVRC/CLS-LOC/val": 2})
    assert open_source(DataConfig(path=str(tmp_path), split="val")).label_column is None
    assert set(open_source(DataConfig(path=str(tmp_path))).labels()) == {"n01"}
