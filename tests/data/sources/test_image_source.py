"""Every way to name images, and every way to get it wrong."""

import gzip
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from sslkit.data.decode.rgb import decode_rgb
from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.errors import UserError
from sslkit.evaluate.labelled_data import open_pair


def test_builtin_set_is_balanced_real_and_labelled() -> None:
    for split, size in (("train", 10_000), ("test", 2_000)):
        source = open_source(DataConfig(path="builtin:fashion_mnist", split=split))
        counts = np.unique(source.labels(), return_counts=True)
        assert len(source) == size
        assert set(counts[1]) == {size // 10}
        assert "Ankle boot" in counts[0]
        assert source.read(0).shape == (28, 28, 3)


def test_labels_do_not_reach_pretraining() -> None:
    bare = open_source(DataConfig(path="builtin:fashion_mnist")).without_labels()
    assert bare.table.rows.column_names == ["image"]
    with pytest.raises(UserError, match="no labels"):
        bare.labels()


def test_folder_with_and_without_classes(class_folders: Path, tmp_path: Path) -> None:
    source = open_source(DataConfig(path=str(class_folders)))
    assert len(source) == 40  # "test" in the file names makes no split of its own
    assert sorted(set(source.labels())) == sorted(folder.name for folder in class_folders.iterdir())
    for index, file in enumerate(sorted(class_folders.rglob("*.png"))[:7]):
        (tmp_path / f"{index}.png").write_bytes(file.read_bytes())
    flat = open_source(DataConfig(path=str(tmp_path)))
    assert len(flat) == 7
    assert flat.label_column is None
    by_loader = open_source(DataConfig(path="imagefolder", data_dir=str(tmp_path)))
    assert len(by_loader) == 7


def test_split_folders_and_shared_class_numbers(class_folders: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(class_folders)
    only = sorted(class_folders.iterdir())[-1]
    (tmp_path / "val" / only.name).mkdir(parents=True)
    for file in only.iterdir():
        (tmp_path / "val" / only.name / file.name).write_bytes(file.read_bytes())
    pair = open_pair(DataConfig(path=str(tmp_path)))
    assert (len(pair.train), len(pair.test)) == (40, len(list(only.iterdir())))
    assert {pair.classes[label] for label in pair.test_labels} == {only.name}


def test_a_class_named_like_a_split_is_refused(class_folders: Path, tmp_path: Path) -> None:
    for name in ("car", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(next(class_folders.rglob("*.png")).read_bytes())
    with pytest.raises(UserError, match="folders of splits and others"):
        open_source(DataConfig(path=str(tmp_path)))
    (tmp_path / "car").rename(tmp_path / "test")
    (tmp_path / "train").rename(tmp_path / "val")
    with pytest.raises(UserError, match=r"\[data\] split: .* has folders of \['test', 'val'\], none of 'train'"):
        open_source(DataConfig(path=str(tmp_path)))


def test_held_out_fifth_without_a_test_split(class_folders: Path) -> None:
    pair = open_pair(DataConfig(path=str(class_folders)))
    assert (len(pair.train), len(pair.test)) == (32, 8)
    again = open_pair(DataConfig(path=str(class_folders)))
    assert again.test_labels.tolist() == pair.test_labels.tolist()


def test_parquet_and_arrow(class_folders: Path, tmp_path: Path) -> None:
    files = sorted(class_folders.rglob("*.png"))[:5]
    table = datasets.Dataset.from_dict({"picture": [{"bytes": f.read_bytes(), "path": None} for f in files]})
    table.to_parquet(str(tmp_path / "part.parquet"))
    for path in (tmp_path, tmp_path / "part.parquet"):
        source = open_source(DataConfig(path=str(path), image_column="picture"))
        assert len(source) == 5
        assert source.read(2).shape == (28, 28, 3)
    with pytest.raises(UserError, match=r"\[data\] image_column: no column of images"):
        open_source(DataConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="did you mean 'picture'"):
        open_source(DataConfig(path=str(tmp_path), image_column="pictures"))


def test_idx_files_of_the_full_set(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 28, 28), dtype=np.uint8)
    images = b"\0\0\x08\x03" + struct.pack(">3I", 6, 28, 28) + pixels.tobytes()
    labels = b"\0\0\x08\x01" + struct.pack(">I", 6) + bytes(range(6))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    config = DataConfig(path="builtin:fashion_mnist", name="full", data_dir=str(tmp_path))
    source = open_source(config)
    assert np.array_equal(source.read(4)[..., 0], pixels[4])
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images[:-1]))
    with pytest.raises(UserError, match="not an IDX file"):
        open_source(config)


def test_modes_and_orientation(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    for mode, suffix in [("L", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"), ("P", "gif")]:
        file = tmp_path / f"{mode}.{suffix}"
        picture.convert(mode).save(file)
        assert decode_rgb(file.read_bytes(), "x").shape == (4, 4, 3)
    wide = Image.fromarray(np.zeros((4, 8, 3), dtype=np.uint8))
    exif = wide.getexif()
    exif[274] = 6
    wide.save(tmp_path / "turned.jpg", exif=exif)
    assert decode_rgb((tmp_path / "turned.jpg").read_bytes(), "x").shape == (8, 4, 3)


@pytest.mark.parametrize("content", [b"", b"<html>no picture</html>", b"\x89PNG\r\n\x1a\n0000"])
def test_what_is_no_image_is_named(content: bytes) -> None:
    with pytest.raises(UserError, match=r"cannot read cat\.jpg"):
        decode_rgb(content, "cat.jpg")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"path": "builtin:fashion"}, "did you mean 'builtin:fashion_mnist'"),
        ({"path": "builtin:fashion_mnist", "split": "val"}, r"\[data\] split"),
        ({"path": "builtin:fashion_mnist", "name": "all"}, r"\[data\] name"),
        ({"path": "/no/such/folder"}, r"\[data\] path: no folder or file '/no/such/folder'"),
        ({"path": "testz"}, r"\[data\] path: no folder or file 'testz'; did you mean 'tests'\?"),
        ({"path": "imagefolder"}, r"\[data\] data_dir"),
        ({"path": "user/no-such-set"}, r"\[data\] path: cannot load 'user/no-such-set'"),
    ],
)
def test_refusals(config: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_source(DataConfig(**config))


def test_empty_folder_and_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty"):
        open_source(DataConfig(path=str(tmp_path)))
    (tmp_path / "notes.txt").write_text("no pictures here")
    with pytest.raises(UserError, match=r"\[data\]"):
        open_source(DataConfig(path=str(tmp_path)))


def test_folders_of_links_and_hidden_ones(class_folders: Path, tmp_path: Path) -> None:
    """Class folders may lie elsewhere; what tools leave behind is no class and no split."""
    for folder in sorted(class_folders.iterdir()):
        (tmp_path / "linked" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "linked" / "train" / folder.name).symlink_to(folder)
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / "linked" / name).mkdir()
    source = open_source(DataConfig(path=str(tmp_path / "linked")))
    assert (len(source), len(set(source.labels()))) == (40, len(list(class_folders.iterdir())))
    flat = tmp_path / "flat"
    (flat / ".thumbnails").mkdir(parents=True)
    (flat / "0.png").write_bytes(next(class_folders.rglob("*.png")).read_bytes())
    (flat / ".thumbnails" / "0.png").write_bytes(b"")
    source = open_source(DataConfig(path=str(flat)))
    assert (len(source), source.label_column) == (1, None)
