"""Masks and the like beside their images, told by their names, in folders and in tar files alike."""

import io
import tarfile
from pathlib import Path

import pytest
from hostile import encode, photo
from PIL import Image

from sslkit.data.sources.image_source import DataConfig, open_source

PNG = encode(Image.fromarray(photo()), "PNG")
NUMBERS = ("001", "002", "003")


def beside(companion: str, image: str = "{}.jpg") -> list[str]:
    return [pattern.format(number) for number in NUMBERS for pattern in (image, companion)]


CASES = {  # the files, and how many of them are images
    **{
        word: (beside(f"{{}}{word}.png"), 3)
        for word in ("_mask", "_seg", "_label", "-mask", ".mask", "_annotation", "_gt", "_depth", "_MASK", " mask")
    },
    "same suffix": (beside("{}_mask.png", "{}.png"), 3),
    "segmentation": (beside("ISIC_{}_segmentation.png", "ISIC_{}.jpg"), 3),
    "several each": ([*beside("a ({})_mask.png", "a ({}).png"), "a (001)_mask_1.png", "a (001)_mask_2.png"], 3),
    "two kinds": ([*beside("{}_depth.png"), *(f"{number}_mask.png" for number in NUMBERS)], 3),
    "both have a word": (beside("{}_mask.png", "{}_sat.jpg"), 3),
    "word first": (beside("mask_{}.png", "image_{}.jpg"), 3),
    "one image has none": ([*beside("{}_mask.png"), "004.jpg"], 4),
    "classes": ([f"{kind}/{name}" for kind in ("cat", "dog") for name in beside("{}_mask.png")], 6),
    "only one class has any": ([f"good/{n}.jpg" for n in range(9)] + [f"hole/{n}" for n in beside("{}_mask.png")], 12),
    "no companion": (["white_mask.png", "a.png", "b.png"], 3),
    "one among many": (["white.png", "white_mask.png", "a.png", "b.png"], 4),
    "in another folder": (["cat/001.png", "dog/001_mask.png"], 2),
    "nothing else": ([f"{number}_mask.png" for number in NUMBERS], 3),
    "part of a word": (beside("{}_unmasked.png"), 6),
    "classes by word": (["with_mask/1.png", "with_mask/2.png", "without_mask/1.png"], 3),
}  # fmt: skip
MASKS_OF_SAMPLES = (".mask",)  # in a tar file these belong to the image's own sample


def write(root: Path, files: list[str], kind: str) -> Path:
    if kind == "folder":
        for name in files:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(PNG)
        return root
    with tarfile.open(root / "a.tar", "w") as tar:
        for name in files:
            info = tarfile.TarInfo(name)
            info.size = len(PNG)
            tar.addfile(info, io.BytesIO(PNG))
    return root / "a.tar"


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("case", CASES)
def test_companions_of_images_are_no_images(
    case: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, expected = CASES[case]
    path = write(tmp_path, files, kind)
    with caplog.at_level("INFO", "sslkit.data"):
        source = open_source(DataConfig(path=str(path)))
    assert len(source) == expected
    if expected == len(files) or (kind == "tar" and case in MASKS_OF_SAMPLES):
        return
    left = [Path(source.name(index)).name for index in range(len(source))]
    assert f"masks and the like beside images, left out: {len(files) - expected}, such as " in caplog.text
    assert not any(f"such as {name};" in caplog.text for name in left)
    assert len(open_source(DataConfig(path=str(path), split="all"))) == len(files)  # the way that the sentence names


def test_the_sentence_names_only_the_suffixes_that_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "sslkit.data"):
        open_source(DataConfig(path=str(write(tmp_path, beside("{}_mask.png"), "tar"))))
    assert "image files .jpg, no labels, masks and the like" in caplog.text


def test_companions_in_a_split_are_left_out_with_their_labels(tmp_path: Path) -> None:
    files = [f"{split}/{kind}/{name}" for split in ("train", "test") for kind in "ab" for name in beside("{}_mask.png")]
    source = open_source(DataConfig(path=str(write(tmp_path, files, "folder"))))
    assert source.labels() == ["a"] * 3 + ["b"] * 3
