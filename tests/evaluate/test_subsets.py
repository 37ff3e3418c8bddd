"""A few labels: stratified, seeded, nested, or as a published list names them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslkit.data.sources.image_source import DataConfig, ImageSource, open_source
from sslkit.errors import UserError
from sslkit.evaluate.label_subsets import choose_subset

LABELS = np.repeat([0, 1, 2], [100, 37, 5])


@pytest.fixture(scope="module")
def folders(class_folders: Path) -> ImageSource:
    return open_source(DataConfig(path=str(class_folders)))


@pytest.mark.parametrize(("words", "expected"), [("10%", [10, 4, 1]), ("1%", [1, 1, 1]), ("100%", [100, 37, 5])])
def test_a_share_of_every_class_and_at_least_one(folders: ImageSource, words: str, expected: list[int]) -> None:
    chosen = choose_subset(folders, LABELS, words, seed=0)
    assert np.bincount(LABELS[chosen]).tolist() == expected
    assert (np.diff(chosen) > 0).all()


def test_shots_are_seeded_and_nested(folders: ImageSource) -> None:
    five, two = (set(choose_subset(folders, LABELS, f"{shots}-shot", 0).tolist()) for shots in (5, 2))
    assert len(five) == 15
    assert two < five
    assert five == set(choose_subset(folders, LABELS, "5-shot", 0).tolist())
    assert five != set(choose_subset(folders, LABELS, "5-shot", 1).tolist())
    assert choose_subset(folders, LABELS, "all", 0).tolist() == list(range(142))


def test_a_published_list_names_its_images(folders: ImageSource, tmp_path: Path) -> None:
    paths = folders.paths()
    labels = np.zeros(len(paths), dtype=np.int64)
    by_file, by_folder = Path(paths[7]).name, "/".join(Path(paths[3]).parts[-2:])
    (tmp_path / "names.txt").write_text(f"{by_file}\n{by_folder}\n\n")
    assert choose_subset(folders, labels, str(tmp_path / "names.txt"), 0).tolist() == [3, 7]
    windows = f"{by_file}\r\n{by_folder}\r\n".replace("/", "\\")
    (tmp_path / "names.txt").write_text(windows, encoding="utf-8-sig", newline="")
    assert choose_subset(folders, labels, str(tmp_path / "names.txt"), 0).tolist() == [3, 7]
    with pytest.raises(UserError, match="must not be empty"):
        choose_subset(folders, labels, "", 0)
    (tmp_path / "names.txt").write_text(f"{by_file}\nn01440764_10026.JPEG\n")
    with pytest.raises(UserError, match=r"1 of its 2 names are not in .*, the first is 'n01440764_10026.JPEG'"):
        choose_subset(folders, labels, str(tmp_path / "names.txt"), 0)


def test_names_that_could_be_several_images(tmp_path: Path) -> None:
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="test")).subset(np.arange(2))
    for index, folder in enumerate(("shoes", "shirts")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        Image.fromarray(source.read(index)).save(tmp_path / "data" / folder / "0.png")
    folders = open_source(DataConfig(path=str(tmp_path / "data")))
    (tmp_path / "names.txt").write_text("0.png\n")
    with pytest.raises(UserError, match=r"'0\.png' is the name of 2 images; add their folders"):
        choose_subset(folders, np.zeros(2, dtype=np.int64), str(tmp_path / "names.txt"), 0)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("0%", "above 0%"),
        ("101%", "at most 100%"),
        ("many%", "'many' is not a number"),
        ("6-shot", "smallest class has 5 images"),
        ("1.5-shot", "whole number"),
        ("nothing.txt", "no such file"),
    ],
)
def test_words_that_mean_nothing(folders: ImageSource, words: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        choose_subset(folders, LABELS, words, 0)
