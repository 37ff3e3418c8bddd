"""Names of splits: one rule for folders, tables, tar files, saved sets and streams; no held-out image is trained on."""

import json
from pathlib import Path

import datasets
import pytest
from layouts import PNG, count, make, write_tables

from sslkit.cli import main
from sslkit.data.formats.splits import choose, split_names, splits_of_folders
from sslkit.data.sources.image_source import DataConfig, available_splits, open_source
from sslkit.errors import UserError
from sslkit.evaluate.labelled_data import open_pair


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train", ["train"]),
        ("Training", ["training"]),
        ("TRAIN", ["train"]),
        ("trainA", ["train"]),
        ("trainset", ["train"]),
        ("train-set", ["train"]),
        ("testset", ["test"]),
        ("test_set", ["test"]),
        ("training_set", ["training"]),
        ("train_images", ["train"]),
        ("testimages", ["test"]),
        ("trn", ["trn"]),
        ("TstSet", ["tst"]),
        ("photos-trn-0003", ["trn"]),
        ("astronomy", []),
        ("tstop", []),
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
    assert sorted(split_names(name)) == words


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
        (["trn", "tst"], "train", ["trn"]),
        (["train", "test"], "tst", ["test"]),
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
        (["trainset", "testset"], SPLITS),
        (["train-set", "test-set"], SPLITS),
        (["train_images", "test_images"], SPLITS),
        (["trn", "tst", "val"], SPLITS),
        (["train_1", "test_1"], SPLITS),
        (["train_labeled", "test_noisy"], SPLITS),
        (["train_cats", "test_cats"], SPLITS),
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
        (["airport", "test_kitchen", "train_station"], CLASSES),
        (["tower", "train_interior", "test_kitchen", "train_station"], CLASSES),
        (["cats", "test_cats", "train_cats"], REFUSED),
        (["airport", "test_images", "train_images"], REFUSED),
        (["extra", "test_noisy", "train_labeled"], REFUSED),
        (["airport", "trn"], REFUSED),
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
    with pytest.raises(UserError, match=r"'gone\.arrow', which does not exist"):
        count(tmp_path / "set")


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
