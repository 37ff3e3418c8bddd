"""Tables beside image files, keys that mean nothing for a place, files that are no images: read, or a way out said."""

import csv
import json
import logging
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hostile import encode, photo
from PIL import Image
from pyarrow import parquet

from sslkit.cli import main
from sslkit.data.sources.image_source import DataConfig, ImageSource, open_source, skipped_files
from sslkit.errors import UserError

PNGS = [encode(Image.fromarray(photo(seed)), "PNG") for seed in range(4)]
ROWS = [("0.png", "cat"), ("1.png", "dog"), ("2.png", "cat")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images."""
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    for number, png in enumerate(PNGS):
        (root / f"{number}.png").write_bytes(png)
    return root


def read(path: Path | str, **words: Any) -> ImageSource:
    return open_source(DataConfig(path=str(path), **words))


def stored(source: ImageSource) -> list[bytes]:
    return [source.encoded(index)[1] for index in range(len(source))]


def table(separator: str = ",", heading: Sequence[str] = ("file_name", "label"), rows: Any = ROWS) -> str:
    return "\r\n".join(separator.join(cells) for cells in [heading, *rows]) + "\r\n"


GOOD: Mapping[str, bytes] = {
    "commas": table().encode(),
    "semicolons, as Excel writes them": table(";").encode("utf-8-sig"),
    "tabs": table("\t").encode(),
    "Excel's own line": b"sep=;\r\n" + table(";").encode(),
    "spaces in the heading": table(heading=(" file_name ", "label")).encode(),
    "an empty line and a short row": (table() + "\r\n3.png\r\n").encode(),
    "quotes": b'file_name,label\n"0.png","cat"\n"1.png",dog\n2.png,cat\n',
    "columns the other way": table(";", ("label", "file_name"), [row[::-1] for row in ROWS]).encode(),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_way_to_write_a_csv(name: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "metadata.csv").write_bytes(GOOD[name])
    with caplog.at_level(logging.INFO, "sslkit.data"):
        source = read(folder)
    if "short row" in name:
        assert stored(source) == PNGS
        with pytest.raises(UserError, match="row 3 has the label None"):
            source.labels()
        return
    assert (stored(source), source.labels()) == (PNGS[:3], ["cat", "dog", "cat"])
    assert "images that metadata.csv does not name, left out: 1 of 4" in caplog.text


def test_jsonl_and_parquet(folder: Path) -> None:
    lines = [json.dumps({"file_name": name, "label": label}) for name, label in ROWS]
    (folder / "metadata.jsonl").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    assert (stored(read(folder)), read(folder).labels()) == (PNGS[:3], ["cat", "dog", "cat"])
    (folder / "metadata.jsonl").unlink()
    names, labels = zip(*ROWS, strict=True)
    parquet.write_table(pa.table({"file_name": names, "label": labels}), folder / "metadata.parquet")
    assert (stored(read(folder)), read(folder).labels()) == (PNGS[:3], ["cat", "dog", "cat"])


def test_order_and_places_are_those_of_the_rows(folder: Path) -> None:
    (folder / "3.png").rename(folder / "sub" / "3.png")
    (folder / "metadata.csv").write_text("file_name,label,caption\nsub\\3.png,b,x\n./0.png,a,\n")
    source = read(folder)
    assert (stored(source), source.labels()) == ([PNGS[3], PNGS[0]], ["b", "a"])
    (folder / "metadata.csv").rename(folder / "sub" / "metadata.csv")
    (folder / "sub" / "metadata.csv").write_text("file_name,label\n3.png,b\n")
    assert stored(read(folder)) == [PNGS[3]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (table(heading=("filename", "label")).encode(), "no column 'file_name' .*did you mean 'filename'"),
        (b"id,label\n0,cat\n", "no column 'file_name' among .*; rename the column"),
        (table().encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("file_name,label\n0.png,caf\u00e9\n".encode("cp1252"), "is not UTF-8 .*; save it as UTF-8"),
        (b"file_name,label\n0.png,a,b\n", "line 2 has 3 cells, but the header has 2"),
        (b"file_name,label\n../0.png,a\n", "row 0 of .* names '../0.png'; file_name must be the path of a file below"),
        (b"file_name,label\n/etc/passwd,a\n", "row 0 of .* names '/etc/passwd'"),
        (b"file_name,label\nx.png,a\ny.png,a\n", "none of the files that .* names exists, such as"),
        (b"", "no column 'file_name'"),
    ],
)
def test_what_is_wrong_with_a_csv_is_said_and_moving_it_helps(content: bytes, words: str, folder: Path) -> None:
    (folder / "metadata.csv").write_bytes(content)
    for config in ({"path": str(folder)}, {"path": "imagefolder", "data_dir": str(folder)}):
        with pytest.raises(UserError, match=words) as caught:
            open_source(DataConfig(**config))
        assert "\n" not in str(caught.value)
    if "move metadata.csv elsewhere" in str(caught.value):
        (folder / "metadata.csv").rename(folder.parent / "metadata.csv")
        assert stored(read(folder)) == PNGS


def test_files_that_are_named_and_not_there_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "metadata.csv").write_text("file_name,label\n0.png,a\ngone.png,b\n1.png,b\n")
    with pytest.raises(SystemExit):
        main(["data", "check", str(folder), "--workers", "0", "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out)["unreadable"]["count"] == 1
    assert "images that metadata.csv does not name, left out: 2 of 4" in said.err
    assert "files that metadata.csv names and that do not exist: 1, such as" in said.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"data_dir": "nowhere"}, r"\[data\] data_dir: no folder 'nowhere' in .*; there are \['sub'\]"),
        (
            {"data_files": "*.png"},
            r'\[data\] data_files: goes with path = "imagefolder".*write path = "imagefolder" and',
        ),
        ({"name": "full"}, r"\[data\] name: 'full' selects a configuration of a Hub dataset.*leave name out"),
    ],
)
def test_keys_that_mean_nothing_for_a_folder_are_refused(words: dict[str, str], sentence: str, folder: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        read(folder, **words)


def test_keys_that_mean_something_are_obeyed(folder: Path) -> None:
    (folder / "3.png").rename(folder / "sub" / "3.png")
    assert stored(read(folder, data_dir="sub")) == PNGS[3:]
    with pytest.raises(UserError) as caught:
        read(folder, data_files="*.png")
    advised = str(caught.value).partition("data_files = ['")[2].partition("'")[0]
    assert stored(open_source(DataConfig(path="imagefolder", data_files=[advised]))) == PNGS[:3]
    assert len(open_source(DataConfig(path="imagefolder", data_dir=str(folder), data_files="sub/*.png"))) == 1
    parquet.write_table(pa.table({"image": PNGS[:2]}), folder / "sub" / "t.parquet")
    for words in ({"name": "x"}, {"data_dir": "x"}, {"data_files": "x"}):
        with pytest.raises(UserError, match=rf"\[data\] {next(iter(words))}: .*leave {next(iter(words))} out"):
            read(folder / "sub" / "t.parquet", **words)
    for words in ({"data_dir": "x"}, {"data_files": "x"}):
        with pytest.raises(UserError, match=rf"\[data\] {next(iter(words))}: .*leave {next(iter(words))} out"):
            read("builtin:fashion_mnist", **words)
    with pytest.raises(UserError, match=r"\[data\] name"):
        open_source(DataConfig(path="imagefolder", data_dir=str(folder), name="x"))


def test_files_without_a_suffix_of_images(tmp_path: Path) -> None:
    """The command that the sentence names is run."""
    for suffix in (".img", ""):
        root = tmp_path / f"set{suffix}"
        root.mkdir()
        for number, png in enumerate(PNGS):
            (root / f"{number}{suffix}").write_bytes(png)
        with pytest.raises(
            UserError, match=r"holds no images, judging by file names: .* 4; the first looks like \.png"
        ) as caught:
            read(root)
        command = str(caught.value).partition("for example by: ")[2]
        subprocess.run(["bash", "-c", command], cwd=root, check=True)
        assert stored(read(root)) == PNGS


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("0.npy", r"\.npy 1; \.npy: these are arrays: save each as an image, by PIL\.Image\.fromarray"),
        ("0.mp4", r"\.mp4: these are videos"),
        ("0.zip", r"unpack the archives first"),
        ("0.heic", r"convert them to JPEG or PNG"),
        ("0.dcm", r"convert them to PNG or TIFF"),
        ("0.xyz", r"\.xyz 1; give the folder that holds the images themselves"),
    ],
)
def test_folders_of_other_files_are_told_what_to_do(name: str, words: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", photo())
    os.rename(tmp_path / "x.npy", tmp_path / name)
    with pytest.raises(UserError, match=words):
        read(tmp_path)
    if name.endswith(".npy"):
        array = np.load(tmp_path / name)
        Image.fromarray(array.astype("uint8")).save(tmp_path / "0.png")
        assert np.array_equal(read(tmp_path).read(0), photo())
        assert skipped_files(DataConfig(path=str(tmp_path))) == {".npy": 1}


def test_a_table_as_large_as_it_comes_is_read_by_the_csv_module(folder: Path) -> None:
    """Quoted cells with line ends and separators in them stay one cell."""
    with (folder / "metadata.csv").open("w", newline="") as stream:
        csv.writer(stream, delimiter=";").writerows([("file_name", "text", "label"), ("0.png", "a;b\nc", "cat")])
    assert read(folder).labels() == ["cat"]


def test_labels_of_mixed_types_stop_evaluation_only(folder: Path) -> None:
    rows = [{"file_name": "0.png", "label": [1, 2]}, {"file_name": "1.png", "label": "x"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = read(folder)
    assert len(source) == 2
    with pytest.raises(UserError, match=r"row 0 has the label \['1', '2'\], several classes"):
        source.labels()
    rows[0]["label"] = 3
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(folder).labels() == ["3", "x"]


@pytest.mark.parametrize("loader", ["parquet", "arrow", "imagefolder"])
def test_patterns_that_name_nothing(loader: str, folder: Path) -> None:
    with pytest.raises(UserError, match=r"\[data\] data_files: no file matches .*nope"):
        open_source(DataConfig(path=loader, data_files=f"{folder}/nope*"))
    with pytest.raises(UserError, match=r"\[data\] path: "):
        read("x" * 300 + "/y")
