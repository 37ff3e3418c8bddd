"""Arrow files of strangers: whatever they say of themselves, one sentence or images, and nobody else's files."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hostile import encode, photo
from PIL import Image
from pyarrow import parquet

from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.sources.image_source import DataConfig, ImageSource, available_splits, open_source
from sslkit.errors import UserError

PNG = encode(Image.fromarray(photo()), "PNG")
CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGES = pa.array([{"bytes": PNG, "path": "../../etc/x"}] * 3, CELL)
IMAGE = {"image": {"_type": "Image"}}


def open_table(folder: Path, columns: dict[str, Any], metadata: Any = None) -> ImageSource:
    table = pa.table(columns)
    if metadata is not None:
        encoded = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
        table = table.replace_schema_metadata({b"huggingface": encoded})
    with pa.ipc.new_stream(str(folder / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    return open_source(DataConfig(path=str(folder)))


@pytest.mark.parametrize(
    "metadata",
    [
        *(b"{", [1], {"info": []}, {"info": None}, {"info": {"features": "x"}}, {"info": {"features": {"image": 3}}}),
        *({"info": {"features": [IMAGE]}}, {"info": {"features": {"image": {"_type": "os.system"}}}}, b"[" * 200_000),
    ],
)
def test_metadata_that_is_none(metadata: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load") as caught:
        open_table(tmp_path, {"image": IMAGES}, metadata)
    assert len(str(caught.value).splitlines()) == 1


def test_numbers_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds Value.*, not images"):
        open_table(tmp_path, {"image": pa.array([1, 2, 3])})


def test_other_columns_are_not_looked_at(tmp_path: Path) -> None:
    """A sound would want a library that is not here."""
    sound = {"info": {"features": {**IMAGE, "x": {"_type": "Audio"}}}}
    source = open_table(tmp_path, {"image": IMAGES, "x": IMAGES}, sound)
    assert source.read(2).shape == photo().shape
    assert source.table.rows.column_names == ["image"]


def test_a_row_may_not_name_a_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "private.png").write_bytes(PNG)
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "own.png").write_bytes(PNG)
    (shared / "link.png").symlink_to(tmp_path / "private.png")
    names = [str(tmp_path / "private.png"), str(shared / "own.png"), str(shared / "link.png"), "/etc/passwd"]
    cells = pa.array([{"bytes": None, "path": name} for name in names], CELL)
    source = open_table(shared, {"image": cells}, {"info": {"features": IMAGE}})
    assert source.read(1).shape == photo().shape
    for index in (0, 2, 3):
        with pytest.raises(UnreadableImage, match="outside of"):
            source.read(index)


@pytest.mark.parametrize("label", [-1, 2, 99, None])
def test_labels_of_no_class_are_said(label: int | None, tmp_path: Path) -> None:
    features = {**IMAGE, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    labels = pa.array([0, 1, label], pa.int64())
    source = open_table(tmp_path, {"image": IMAGES, "label": labels}, {"info": {"features": features}})
    with pytest.raises(UserError, match=r"row 2 has the label .*, which is of no class"):
        source.labels()


def write(file: Path, rows: int = 3, **columns: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"image": IMAGES[:rows], **columns}), file)
    return file


@pytest.mark.parametrize("names", ["data/{}-00000-of-00001.parquet", "{}.parquet", "default/{}/0000.parquet"])
def test_splits_by_the_names_of_tables_are_kept_apart(names: str, tmp_path: Path) -> None:
    """As the Hub lays them out: a test split must not be trained on."""
    write(tmp_path / names.format("train"), 3)
    write(tmp_path / names.format("test"), 2)
    write(tmp_path / ".cache" / "junk.parquet").write_bytes(b"junk")
    for split, count in (("train", 3), ("test", 2)):
        assert len(open_source(DataConfig(path=str(tmp_path), split=split))) == count
    assert available_splits(DataConfig(path=str(tmp_path))) == ["train", "test"]
    with pytest.raises(UserError, match=r"has parquet files of \['test', 'train'\], none of 'val'"):
        open_source(DataConfig(path=str(tmp_path), split="val"))
    write(tmp_path / "more.parquet")
    with pytest.raises(UserError, match=r"of the splits \['test', 'train'\] and others, such as 'more.parquet'"):
        open_source(DataConfig(path=str(tmp_path)))


def test_tables_below_other_folders_and_links(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "X.PARQUET")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "here").symlink_to(tmp_path / "a")
    for folder in ("a", "linked"):
        assert len(open_source(DataConfig(path=str(tmp_path / folder)))) == 3


def test_a_table_at_fault_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.parquet")
    write(tmp_path / "empty.parquet", 0)
    assert len(open_source(DataConfig(path=str(tmp_path)))) == 3  # one without rows harms nobody
    other = tmp_path / "b.parquet"

    def said() -> str:
        with pytest.raises(UserError) as caught:
            open_source(DataConfig(path=str(tmp_path)))
        assert capfd.readouterr().err == ""
        return str(caught.value)

    whole = write(other).read_bytes()
    other.write_bytes(whole[: len(whole) // 2])
    assert "b.parquet': Parquet magic bytes not found" in said()
    write(other, label=[1, 2, 3])
    assert "b.parquet' has the columns ['image', 'label'], but" in said()
    parquet.write_table(pa.table({"image": [PNG]}), other)
    assert "the column 'image' is binary in" in said()
    parquet.write_table(pa.table({"image": IMAGES}), other, use_dictionary=False, compression="zstd")
    content = bytearray(other.read_bytes())
    content[4:2000] = bytes(1996)
    other.write_bytes(content)
    assert "b.parquet" in said()


def test_an_arrow_file_at_fault_is_named(tmp_path: Path) -> None:
    open_table(tmp_path, {"image": IMAGES})
    content = (tmp_path / "x.arrow").read_bytes()
    for bad in (content[:-300], b"nothing of the kind"):
        (tmp_path / "y.arrow").write_bytes(bad)
        with pytest.raises(UserError, match=r"cannot load '.*y\.arrow'"):
            open_source(DataConfig(path=str(tmp_path)))


def test_a_table_beside_images(tmp_path: Path) -> None:
    """What says something of image files is no data of its own; a relative name is meant from the table."""
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(PNG)
    parquet.write_table(pa.table({"file_name": ["0.png"], "label": ["cat"]}), tmp_path / "metadata.parquet")
    assert open_source(DataConfig(path=str(tmp_path))).labels() == ["cat"]
    (tmp_path / "metadata.parquet").rename(tmp_path / "sizes.parquet")
    with pytest.raises(UserError, match='for the image files beside it, write path = "imagefolder" and data_dir'):
        open_source(DataConfig(path=str(tmp_path)))
    assert len(open_source(DataConfig(path="imagefolder", data_dir=str(tmp_path)))) == 2
    parquet.write_table(pa.table({"image": ["1.png"]}), tmp_path / "sizes.parquet")
    assert open_source(DataConfig(path=str(tmp_path))).read(0).shape == photo().shape
