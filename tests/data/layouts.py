"""Folders, tables and tar files of small images, to be read by their splits."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from hostile import encode, photo
from PIL import Image
from pyarrow import parquet

from sslkit.data.sources.image_source import DataConfig, open_source

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
