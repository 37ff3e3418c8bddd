"""Metadata tables beside image files: ``metadata.csv``, ``.jsonl`` or ``.parquet``, as `datasets` defines them.

Each row is an image. Its ``file_name`` is relative to the table's folder; other columns may hold labels.
"""

import codecs
import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from pyarrow import parquet

from sslkit.data.formats.folder_listing import METADATA, display_path, folders_in, to_text
from sslkit.data.formats.image_folders import ImageFiles
from sslkit.errors import UserError, first_line, near_miss

SEPARATORS = (",", ";", "\t", "|")
FILE = "file_name"


def metadata_files(images: ImageFiles) -> list[Path]:
    """The metadata tables in a split's folders and their subfolders. For one that lies above them, add a note."""
    folders = [path for each in images.split_folders for path in (each, *(each / name for name in folders_in(each)))]
    for name in METADATA:
        if images.root not in images.split_folders and os.path.lexists(images.root / name):
            images.notes.append(f"{name} beside the folders of the splits is not read; give each split its own")
    return sorted({folder / name for folder in folders for name in METADATA if os.path.lexists(folder / name)})


def table_by_metadata(images: ImageFiles, files: list[Path]) -> datasets.Dataset:
    """The rows of metadata tables, in order. Adds notes to ``images`` about files that are missing or not named.

    A table that cannot be read, or that names no files, files outside of its folder, or only files that do not exist,
    raises `UserError`.
    """
    if len({file.suffix for file in files}) > 1:
        raise UserError(f"[data] path: {files[0]} and {files[-1]} both describe the images; keep one of them")
    existing = {path for folder in images.folders for path in folder.images.to_pylist()}
    named: set[str] = set()
    tables = []
    absent: list[str] = []
    for file in files:
        columns = _columns(file)
        for name, values in columns.items():
            if not _names_files(name):
                continue
            paths = [_path(file, value, row) for row, value in enumerate(values)]
            named.update(path for path in paths if path)
            absent += [path for path in paths if path and path not in existing and not os.path.exists(path)]
            columns[name] = [{"bytes": None, "path": path} for path in paths]
        tables.append(_as_dataset(columns))
    if named and len(absent) >= len(named):
        raise UserError(
            f"[data] path: none of the files that {files[0]} names exists, such as {absent[0]!r}; {FILE} must be "
            f"relative to {str(files[0].parent)!r}{_without(files[0])}"
        )
    which = " and ".join(sorted({file.name for file in files}))
    if unnamed := len(existing - named):
        images.notes.append(f"images that {which} does not name, left out: {unnamed:,} of {len(existing):,}")
    if absent:
        images.notes.append(f"files that {which} names and that do not exist: {len(absent):,}, such as {absent[0]}")
    names = set(tables[0].column_names)
    if any(set(table.column_names) != names for table in tables):
        raise UserError(f"[data] path: {files[0]} and {files[-1]} must have the same columns, as tables of one split")
    return datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]


def _names_files(column: str) -> bool:
    return column == FILE or column.endswith(f"_{FILE}")


def _path(file: Path, value: Any, row: int) -> str | None:
    """The path that a row names, below the table's folder; None for an empty cell."""
    if value is None or value == "":
        return None
    name = os.path.normpath(str(value).replace("\\", "/"))
    if not isinstance(value, str) or os.path.isabs(name) or name == ".." or name.startswith("../") or "\0" in name:
        raise UserError(
            f"[data] path: row {row} of {file} names {value!r:.80}; {FILE} must be the path of a file below "
            f"{str(file.parent)!r}, relative to it"
        )
    return to_text(f"{file.parent}/{name}")


def _as_dataset(columns: dict[str, list[Any]]) -> datasets.Dataset:
    """The columns of one table: images by their paths, other columns unchanged, or as text if types are mixed."""
    features: dict[str, Any] = {}
    arrays: dict[str, pa.Array] = {}
    image = datasets.Image(decode=False)
    for name, values in columns.items():
        if _names_files(name):
            own = name.removesuffix(FILE).removesuffix("_") or "image"
            arrays[own], features[own] = pa.array(values, image.pa_type), image
            continue
        try:
            arrays[name] = pa.array(values)
            features[name] = datasets.Features.from_arrow_schema(pa.schema([(name, arrays[name].type)]))[name]
        except (pa.ArrowException, ValueError, TypeError):
            if any(isinstance(value, list) for value in values):
                lists = [value if isinstance(value, list) else [value] for value in values]
                arrays[name] = pa.array([list(map(str, value)) for value in lists], pa.list_(pa.string()))
                features[name] = datasets.List(datasets.Value("string"))
            else:
                texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
                arrays[name], features[name] = pa.array(texts, pa.string()), datasets.Value("string")
    return datasets.Dataset(pa.table(arrays), info=datasets.DatasetInfo(features=datasets.Features(features)))


def _columns(file: Path) -> dict[str, list[Any]]:
    """The columns of a table, of which at least one names files."""
    try:
        columns = READERS[file.suffix](file)
    except (OSError, ValueError, pa.ArrowException, csv.Error, RecursionError) as error:
        reason = first_line(error, 150)
        raise UserError(
            f"[data] path: {display_path(file)} cannot be read: {reason}; correct it{_without(file)}"
        ) from error
    if not any(map(_names_files, columns)):
        if lists := [name for name in columns if name.endswith(f"{FILE}s")]:
            what = f"a column {lists[0]!r} of several files a row; write a row for each, and a column {FILE!r}"
        else:
            close = near_miss(FILE, columns)
            what = f"no column {FILE!r} among {list(columns)[:12]}{close}; rename the column that names the image files"
        raise UserError(f"[data] path: {display_path(file)} has {what}{_without(file)}")
    return columns


def _without(file: Path) -> str:
    return f"; or move {file.name} elsewhere, to read the images without it"


def _text(file: Path) -> str:
    """The text of a file, without a byte order mark."""
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        is_utf_16 = error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        found = "UTF-16" if is_utf_16 else f"not UTF-8 (at byte {error.start})"
        raise ValueError(f"it is {found}; save it as UTF-8 (in Excel: CSV UTF-8)") from error


def _read_csv(file: Path) -> dict[str, list[Any]]:
    """Read cells as text, empty ones as None. The separator is that of the header: one of `SEPARATORS`."""
    text = _text(file)
    first = text.lstrip("\r\n").partition("\n")[0]
    if first.lower().startswith("sep="):  # a line that Excel adds
        text = text.lstrip("\r\n").partition("\n")[2]
        first = text.partition("\n")[0]

    def fit(separator: str) -> tuple[bool, int]:
        names = [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
        return FILE in names, len(names)

    reader = csv.reader(io.StringIO(text), delimiter=max(SEPARATORS, key=fit))
    header = [name.strip() for name in next(reader, [])]
    rows = []
    for cells in reader:
        if len(cells) > len(header):
            raise ValueError(f"line {reader.line_num} has {len(cells)} cells, but the header has {len(header)}")
        if any(cells):
            rows.append(cells + [""] * (len(header) - len(cells)))
    return {name: [row[column] or None for row in rows] for column, name in enumerate(header)}


def _read_jsonl(file: Path) -> dict[str, list[Any]]:
    rows = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(file: Path) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = parquet.read_table(file).to_pydict()
    return columns


READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
