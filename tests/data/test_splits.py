"""Names of splits: one rule for folders, tables, tar files, saved sets and streams; no held-out image is trained on."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hostile import encode, photo
from PIL import Image
from pyarrow import parquet

from sslkit.cli import main
from sslkit.data.formats.splits import choose, split_words, splits_of_folders
from sslkit.data.sources.image_source import DataConfig, available_splits, open_source
from sslkit.errors import UserError
from sslkit.evaluate.labelled_data import open_pair

PNG = encode(Image.fromarray(photo()), "PNG")


def make(root: Path, files: Mapping[str, int]) -> Path:
    """Folders with so many images each; a name that ends in .txt is a text."""
    for folder, count in files.items():
        place = root / folder
        if folder.endswith(".txt"):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("no image")
            continue
        place.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (place / f"{number}.png").write_bytes(PNG)
    return root


def count(root: Path, split: str = "train", **words: Any) -> int:
    return len(open_source(DataConfig(path=str(root), split=split, **words)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train", ["train"]),
        ("Training", ["training"]),
        ("TRAIN", ["train"]),
        ("trainA", ["train"]),
        ("trainset", ["train"]),
        ("val2017", ["val"]),
        ("valid-00000-of-00001", ["valid"]),
        ("imagenet-val-0003", ["val"]),
        ("dev", ["dev"]),
        ("Eval Images", ["eval"]),
        ("evaluation", ["evaluation"]),
        ("testing_set", ["testing"]),
        ("hold_out", ["holdout"]),
        ("held-out", ["holdout"]),
        ("seg_test", ["test"]),
        ("development", []),
        ("trainer", []),
        ("invalid", []),
        ("value", []),
        ("contest", []),
        ("détest", []),
        ("household", []),
        ("train_val", ["train", "val"]),
    ],
)
def test_words_of_splits_in_names(name: str, words: list[str]) -> None:
    assert sorted(split_words(name)) == words


@pytest.mark.parametrize(
    ("there", "asked", "chosen"),
    [
        (["train", "valid"], "validation", ["valid"]),
        (["train", "valid"], "val", ["valid"]),
        (["train", "val", "dev"], "validation", ["val", "dev"]),
        (["train", "val", "dev"], "dev", ["dev"]),
        (["training", "testing"], "train", ["training"]),
        (["training", "testing"], "Test", ["testing"]),
        (["train", "test"], "validation", []),
        (["fold0", "fold1"], "fold1", ["fold1"]),
    ],
)
def test_a_split_is_asked_for_by_any_of_its_names(there: list[str], asked: str, chosen: list[str]) -> None:
    assert choose(there, asked) == chosen


SPLITS, CLASSES, REFUSED = "splits", "classes", "refused"


@pytest.mark.parametrize(
    ("names", "verdict"),
    [
        (["train", "valid", "test"], SPLITS),
        (["Train", "Test"], SPLITS),
        (["training_set", "test_set"], SPLITS),
        (["seg_train", "seg_test"], SPLITS),
        (["train2017", "val2017"], SPLITS),
        (["trainA", "trainB", "testA", "testB"], SPLITS),
        (["train"], SPLITS),
        (["test"], SPLITS),
        (["bus", "car", "train"], REFUSED),
        (["cats", "dogs", "test"], REFUSED),
        (["train", "unlabeled"], REFUSED),
        (["seg_pred", "seg_test", "seg_train"], REFUSED),
        (["photos", "photos_test"], REFUSED),
        (["images", "test_images"], REFUSED),
        (["extra", "test_photos", "train_crops"], REFUSED),
        (["dev", "photos"], REFUSED),
        (["beaker", "flask", "test_tube"], CLASSES),
        (["bus", "car", "test_tube", "train_station", "tram"], CLASSES),
        (["development", "production"], CLASSES),
        (["invalid", "valid"], CLASSES),
        (["bullet_train", "steam_train"], CLASSES),
        (["crash_test", "test_tube"], CLASSES),
        (["cat", "dog"], CLASSES),
    ],
)
def test_folders_side_by_side(names: list[str], verdict: str) -> None:
    if verdict == REFUSED:
        with pytest.raises(UserError, match=r"folders of splits and others.*split = \"all\""):
            splits_of_folders(names, "photos")
    else:
        assert bool(splits_of_folders(names, "photos")) == (verdict == SPLITS)


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
    with pytest.raises(UserError, match=r"folders of splits and others.*name the folder to be read") as caught:
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


def write_tables(root: Path, names: Mapping[str, int], kind: str) -> Path:
    for name, rows in names.items():
        file = root / f"{name}.{'tar' if kind == 'tar' else 'arrow' if kind == 'arrow' else 'parquet'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == "tar":
            with tarfile.open(file, "w") as tar:
                for row in range(rows):
                    info = tarfile.TarInfo(f"{row}.png")
                    info.size = len(PNG)
                    tar.addfile(info, io.BytesIO(PNG))
            continue
        table = pa.table({"image": [PNG] * rows})
        if kind == "arrow":
            with pa.ipc.new_stream(str(file), table.schema) as writer:
                writer.write_table(table)
        else:
            parquet.write_table(table, file)
    return root


KINDS = ("parquet", "arrow", "tar", "stream")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "pattern", ["data/{}-00000-of-00001", "{}", "default/{}/0000", "{}/part-0", "Photos {} 01", "set-{}-0001"]
)
def test_files_of_every_kind_are_told_apart(kind: str, pattern: str, tmp_path: Path) -> None:
    words = {"streaming": True} if kind == "stream" else {}
    for number, (train, held_out) in enumerate((("train", "valid"), ("Training", "EVAL"), ("train", "holdout"))):
        root = tmp_path / str(number)
        write_tables(root, {pattern.format(train): 3, pattern.format(held_out): 2}, kind)
        assert count(root, **words) == 3
        assert count(root, held_out, **words) == 2
        assert count(root, "all", **words) == 5
        assert len(open_pair_sizes(root)) == 2


def open_pair_sizes(root: Path) -> list[str]:
    return available_splits(DataConfig(path=str(root)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "names",
    [
        {"train-0": 3, "extra": 2},
        {"a": 3, "test": 2},
        {"photos-0": 3, "photos-dev-0": 2},
        {"train/0": 3, "more": 2},
        {"test/train-0": 3, "train/train-0": 2},
    ],
)
def test_where_only_some_files_name_a_split_all_is_the_way_out(
    kind: str, names: dict[str, int], tmp_path: Path
) -> None:
    words = {"streaming": True} if kind == "stream" else {}
    write_tables(tmp_path, names, kind)
    if "test/train-0" in names:  # the folders tell
        assert count(tmp_path, **words) == 2
    else:
        with pytest.raises(UserError, match=r"and others, such as .*split = \"all\""):
            count(tmp_path, **words)
    assert count(tmp_path, "all", **words) == 5


def test_a_wildcard_over_several_splits_is_refused(tmp_path: Path) -> None:
    write_tables(tmp_path / "t", {"train-0": 3, "val-0": 2}, "tar")
    write_tables(tmp_path / "p", {"train-0": 3, "val-0": 2}, "parquet")
    for words in (
        {"path": f"{tmp_path}/t/*.tar"},
        {"path": "parquet", "data_files": f"{tmp_path}/p/*.parquet"},
        {"path": "parquet", "data_files": f"{tmp_path}/p/*.parquet", "streaming": True},
    ):
        with pytest.raises(UserError, match=r"files of several splits, \['train', 'val'\]"):
            open_source(DataConfig(**words))
        assert len(open_source(DataConfig(**words, split="all"))) == 5
    assert len(open_source(DataConfig(path=f"{tmp_path}/t/train-*.tar"))) == 3
    assert len(open_source(DataConfig(path=f"{tmp_path}/t/{{train,val}}-0.tar"))) == 5  # each is named


def saved(rows: int) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    cells = {"image": [{"bytes": PNG, "path": None}] * rows, "label": [row % 2 for row in range(rows)]}
    return datasets.Dataset.from_dict(cells, features=features)


def test_saved_folders_are_read_by_their_own_lists(tmp_path: Path) -> None:
    saved(20).save_to_disk(str(tmp_path / "one"))
    whole = datasets.load_from_disk(str(tmp_path / "one"))
    whole.filter(lambda row: row["label"] == 0)  # leaves a cache there
    assert len(list((tmp_path / "one").glob("*.arrow"))) > 1
    source = open_source(DataConfig(path=str(tmp_path / "one")))
    assert (len(source), source.labels()[:3]) == (20, ["cat", "dog", "cat"])
    splits = datasets.DatasetDict({"train": saved(5), "dev": saved(3), "fold 7": saved(2)})
    splits.save_to_disk(str(tmp_path / "several"))
    assert [count(tmp_path / "several", each) for each in ("train", "validation", "fold 7", "all")] == [5, 3, 2, 10]
    assert available_splits(DataConfig(path=str(tmp_path / "several"))) == ["train", "dev", "fold 7"]
    assert count(tmp_path / "several" / "dev") == 3


@pytest.mark.parametrize(
    "state", ["{", "[]", "{}", '{"_data_files": []}', '{"_data_files": [{"filename": "../x.arrow"}]}']
)
def test_a_list_that_is_none_is_one_sentence(state: str, tmp_path: Path) -> None:
    saved(2).save_to_disk(str(tmp_path / "set"))
    (tmp_path / "set" / "state.json").write_text(state)
    with pytest.raises(UserError, match=r"state\.json"):
        count(tmp_path / "set")
    (tmp_path / "set" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "gone.arrow"}]}))
    with pytest.raises(UserError, match=r"'gone\.arrow', which is not there"):
        count(tmp_path / "set")


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
        with pytest.raises(UserError, match=r"leads by a link into .*another split; remove the link"):
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
    with pytest.raises(UserError, match="remove links that lead from folder to folder"):
        count(root)


def test_tables_that_are_links_to_another_split(tmp_path: Path) -> None:
    write_tables(tmp_path, {"train/0": 3, "test/0": 2}, "parquet")
    (tmp_path / "train" / "1.parquet").symlink_to(tmp_path / "test" / "0.parquet")
    with pytest.raises(UserError, match=r"is a link to .* of another split"):
        count(tmp_path)


def test_commands_take_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A class called train: what the sentence names is followed, at the command line too."""
    root = make(tmp_path / "set", {"bus": 4, "car": 4, "train": 4})
    for words, code in (([], 2), (["--split", "all"], 0)):
        with pytest.raises(SystemExit) as ended:
            main(["data", "check", str(root), "--workers", "0", "--json", *words])
        assert (ended.value.code or 0) == code
    said = capsys.readouterr()
    assert json.loads(said.out)["classes"] == {"bus": 4, "car": 4, "train": 4}
    assert "--train-split all" in said.err
    pair = open_pair(DataConfig(path=str(root)), "all")
    assert (pair.classes, len(pair.train) + len(pair.test)) == (["bus", "car", "train"], 12)


def test_the_same_split_under_two_names_is_not_scored_on(tmp_path: Path) -> None:
    make(tmp_path, {"training/cat": 3, "training/dog": 3, "dev/cat": 1, "dev/dog": 1})
    config = DataConfig(path=str(tmp_path))
    assert open_pair(config).split == "train / dev"
    for one, other in (("train", "training"), ("train", "all"), ("all", "dev")):
        with pytest.raises(UserError, match="is also the training split"):
            open_pair(config, one, other)


def test_the_bundled_set_as_a_whole() -> None:
    assert len(open_source(DataConfig(path="builtin:fashion_mnist", split="all"))) == 12_000
    assert len(open_source(DataConfig(path="builtin:fashion_mnist", split="testing"))) == 2_000


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
