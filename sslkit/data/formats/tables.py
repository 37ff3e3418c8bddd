"""Read image and label columns of untrusted Arrow and Parquet files."""

import base64
import glob
import json
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from pyarrow import parquet

from sslkit.data.formats.hints import image_suffix
from sslkit.errors import UserError, first_line

TEXT_OR_BYTES = ("string", "large_string", "string_view", "binary", "large_binary")
SAVED_STATE, SAVED_SPLITS = "state.json", "dataset_dict.json"  # of Dataset.save_to_disk and DatasetDict.save_to_disk
CACHE = re.compile(r"cache-[0-9a-f]{16}.*\.arrow", re.IGNORECASE)  # written by `map` and `filter`
PLAIN_NAME = re.compile(r"(?!\.{0,2}$)[^/\0]+")  # of a file or folder in the same folder


def map_arrow(files: list[str]) -> datasets.Dataset:
    """Map Arrow files into memory, in order, without the copy that `datasets` makes of other files.

    A file that is damaged or no Arrow file raises `UserError`; without files, ValueError is raised.
    """
    tables = []
    for file in files:
        with _named_in_errors(file):
            try:
                table = datasets.Dataset.from_file(file)
                table.data.validate(full=True)  # offsets in an untrusted file may point anywhere
            except pa.ArrowInvalid:  # the other kind of Arrow file, or none
                with open(file, "rb") as stream:
                    if stream.read(6) != b"ARROW1":
                        raise
                patterns = list(map(glob.escape, files))
                return datasets.load_dataset("arrow", data_files={"split": patterns}, split="split")
        tables.append(table)
    if not tables:
        raise ValueError("no such file")
    return datasets.concatenate_datasets(tables)


@contextmanager
def _named_in_errors(file: str) -> Iterator[None]:
    """Raise a `UserError` that names the file if it cannot be read."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"[data] path: cannot load {file!r}: {first_line(error, 150)}; write the file again or leave it out"
        ) from error


def saved_splits(folder: Path) -> dict[str, list[Path]] | None:
    """The files of a folder that `save_to_disk` wrote, by split; None for another folder.

    A dataset without splits has one with an empty name. A list of files that is damaged, or names files that do not
    exist, raises `UserError`.
    """
    if (folder / SAVED_SPLITS).is_file():
        names = _names(folder / SAVED_SPLITS, lambda content: content["splits"])
        return {name: _saved_files(folder / name) for name in names}
    return {"": _saved_files(folder)} if (folder / SAVED_STATE).is_file() else None


def _saved_files(folder: Path) -> list[Path]:
    state = folder / SAVED_STATE
    files = [
        folder / name for name in _names(state, lambda content: [each["filename"] for each in content["_data_files"]])
    ]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"[data] path: {state} names {missing[0]!r}, which does not exist; save the data set again")
    return files


def _names(file: Path, select: Callable[[Any], list[str]]) -> list[str]:
    """The names of files or folders beside ``file`` that it lists; at least one, and none of another folder."""
    try:
        names = select(json.loads(file.read_text(encoding="utf-8")))
        if names and all(map(PLAIN_NAME.fullmatch, names)):
            return names
        raise ValueError("no names, or names of other folders")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"[data] path: {file} is not a list as datasets' save_to_disk writes it; save the data set again"
        ) from error


def without_caches(files: list[Path]) -> list[Path]:
    """Files without the caches of ``map`` and ``filter``, unless there are no others."""
    return [file for file in files if not CACHE.fullmatch(file.name)] or files


def load_parquet(patterns: list[str]) -> datasets.Dataset:
    """Load parquet files, which `datasets` copies once into its cache. Files without rows are left out.

    A file that is damaged, or has other columns than the rest, raises `UserError`.
    """
    files = sorted(file for pattern in patterns for file in glob.glob(pattern, recursive=True))  # none at addresses
    filled = [file for file in files if _num_rows(file)]
    if files and not filled:
        raise UserError(f"[data] path: {files[0]!r} holds no rows")
    if len(filled) < len(files):
        patterns = [*(pattern for pattern in patterns if "://" in pattern), *map(glob.escape, filled)]
    try:
        with _quiet():
            return datasets.load_dataset("parquet", data_files={"split": patterns}, split="split")
    except Exception:  # its message does not name the file
        if filled:
            _check_schemas(filled)
            for file in filled:
                with _named_in_errors(file):
                    deque(parquet.ParquetFile(file).iter_batches(64), maxlen=0)  # reads all rows and keeps none
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep `datasets` from logging an error that it raises as well."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _num_rows(file: str) -> int:
    with _named_in_errors(file):
        return int(parquet.read_metadata(file).num_rows)


def _check_schemas(files: list[str]) -> None:
    """Raise if files have different columns, or columns of types that cannot be converted into each other."""
    first = parquet.read_schema(files[0])
    advice = "give files of one kind, or a [[data.mix]] table for each kind"
    for file in files[1:]:
        schema = parquet.read_schema(file)
        if set(schema.names) != set(first.names):
            raise UserError(
                f"[data] path: {file!r} has the columns {schema.names[:8]}, but {files[0]!r} has {first.names[:8]}; "
                f"{advice}"
            )
        for name in first.names:
            own, other = schema.field(name).type, first.field(name).type
            if pa.types.is_nested(own) != pa.types.is_nested(other):
                raise UserError(
                    f"[data] path: the column {name!r} is {own} in {file!r}, but {other} in {files[0]!r}; {advice}"
                )


def only_columns(table: datasets.Dataset, image: str, label: str | None) -> datasets.Dataset:
    """Select the columns of images, not decoded, and labels. Other columns may need libraries that are not installed.

    An image column that does not hold images raises `UserError`.
    """
    table = table.select_columns([image, *([label] if label and label != image else [])])
    feature = table.features[image]
    if feature == datasets.Image(decode=False):
        return table
    if feature == datasets.Value("binary_view"):
        table = table.cast_column(image, datasets.Value("large_binary"))
        feature = table.features[image]
    if getattr(feature, "dtype", "") in TEXT_OR_BYTES:
        first = next((value for value in table[image] if value), "")
        if problem := _text_problem(first if isinstance(first, str) else first[:200].decode("latin-1")):
            raise UserError(f"[data] image_column: {image!r} holds {problem}")
    if isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Value):
        raise UserError(
            f"[data] image_column: {image!r} holds lists of numbers, not encoded images; convert each to bytes, by "
            "bytes(numbers), if they are those of an image file, or else to an image, by PIL.Image.fromarray"
        )
    try:
        return table.cast_column(image, datasets.Image(decode=False))
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise UserError(f"[data] image_column: column {image!r} holds {feature}, not images; name another") from error


def _text_problem(text: str) -> str:
    """What a text is in place of an image or a file name, and what to do; empty if it may be a file name."""
    if re.match("[a-z][a-z0-9+.-]+://", text, re.IGNORECASE):
        return f"addresses ({text[:60]}), not images; download them first, and name the files"
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        if re.fullmatch("[0-9a-fA-F]{64}", encoded[:64]) and image_suffix(bytes.fromhex(encoded[:64])):
            return "images as hexadecimal text; decode it once, by bytes.fromhex(text), and write the bytes"
        first = "".join(encoded[:80].split())[:64]
        start = base64.b64decode(first.replace("-", "+").replace("_", "/"), validate=True)
    except ValueError:
        return ""
    if not image_suffix(start):
        return ""
    decode = "urlsafe_b64decode" if set("-_") & set(encoded) else "b64decode"
    cut = ".split(',')[-1]" if text.startswith("data:") else ""
    return (
        "images as base64 text; decode it once: import base64, pandas; table = pandas.read_parquet('x.parquet'); "
        f"table['image'] = [text and base64.{decode}(text{cut}) for text in table['image']]; "
        "table.to_parquet('decoded.parquet'); then path = \"decoded.parquet\""
    )


def is_missing(value: Any) -> bool:
    """Whether a label is missing: None, NaN, or empty text."""
    return value is None or value != value or (isinstance(value, str | bytes) and not value.strip())


def label_text(value: Any, names: list[str]) -> str:
    """A label that is not missing as text: the name of its class, or its number if classes have no names.

    A label of no class (such as -1, which marks images without a label), several labels and a measurement raise
    ValueError, with what is wrong and what to do.
    """
    if names:
        if type(value) is int and 0 <= value < len(names):
            return str(names[value])
        raise ValueError("which is of no class; leave unlabelled rows out")
    if isinstance(value, float):
        if value.is_integer():
            return str(int(value))
        raise ValueError(
            "a number with a fraction; evaluation needs classes: name another column (--label-column), or write class "
            "names"
        )
    if isinstance(value, list | dict):
        raise ValueError(
            f"{'several classes' if isinstance(value, list) else 'a structure'}; evaluation needs one class a row: "
            "name another column (--label-column), or write one class name a row"
        )
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
