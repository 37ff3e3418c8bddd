"""Arrow files of strangers: whatever they say of themselves, one sentence or images, and nobody else's files."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hostile import encode, photo
from PIL import Image

from sslkit.data.decode import UnreadableImage
from sslkit.data.source import DataConfig, ImageSource, open_source
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
    assert source.table.column_names == ["image"]


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
