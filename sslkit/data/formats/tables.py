"""Tables in Arrow and parquet files, which are not trusted, and the images and labels in them."""

import base64
import glob
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from pyarrow import parquet

from sslkit.data.formats.hints import image_suffix
from sslkit.errors import UserError

TEXT = ("string", "large_string", "string_view")
SAVED_STATE, SAVED_SPLITS = "state.json", "dataset_dict.json"  # of Dataset.save_to_disk and DatasetDict.save_to_disk
CACHE = re.compile(r"cache-[0-9a-f]{16}.*\.arrow", re.IGNORECASE)  # written by `map` and `filter`


def map_arrow(patterns: list[str], files: list[str] | None = None) -> datasets.Dataset:
    """Map Arrow files into memory, without the copy that `datasets` makes of other files.

    Args:
        patterns: Patterns of the files.
        files: The files themselves, in order; None for those that match the patterns, sorted.

    Raises:
        UserError: A file is damaged or no Arrow file.
        ValueError: There are no files.
    """
    tables = []
    for file in _matching(patterns) if files is None else files:
        try:
            table = datasets.Dataset.from_file(file)
            table.data.validate(full=True)  # offsets in an untrusted file may point anywhere
        except pa.ArrowInvalid as error:  # the other kind of Arrow file, or none
            if not _is_arrow_file(file):
                raise _damaged(file, error) from error
            return datasets.load_dataset("arrow", data_files={"split": patterns}, split="split")
        except OSError as error:
            raise _damaged(file, error) from error
        tables.append(table)
    if not tables:
        raise ValueError("no such file")
    return datasets.concatenate_datasets(tables)


def _is_arrow_file(file: str) -> bool:
    with open(file, "rb") as stream:
        return stream.read(6) == b"ARROW1"


def saved_splits(folder: Path) -> dict[str, list[Path]] | None:
    """The files of a folder that `save_to_disk` wrote, by split; None for another folder.

    A dataset without splits has one with an empty name.

    Raises:
        UserError: A list of files is damaged, or names files that do not exist.
    """
    if (folder / SAVED_SPLITS).is_file():
        splits = _read_list(folder / SAVED_SPLITS, "splits")
        if not all(isinstance(name, str) and _is_plain(name) for name in splits):
            raise _not_saved(folder / SAVED_SPLITS, "names of splits")
        return {name: _saved_files(folder / name) for name in splits}
    return {"": _saved_files(folder)} if (folder / SAVED_STATE).is_file() else None


def without_caches(files: list[Path]) -> list[Path]:
    """Files without the caches of ``map`` and ``filter``, unless there are no others."""
    return [file for file in files if not CACHE.fullmatch(file.name)] or files


def _saved_files(folder: Path) -> list[Path]:
    entries = _read_list(folder / SAVED_STATE, "_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    if not all(isinstance(name, str) and _is_plain(name) for name in names):
        raise _not_saved(folder / SAVED_STATE, "names of files in this folder")
    files = [folder / str(name) for name in names]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(
            f"[data] path: {folder / SAVED_STATE} names {missing[0].name!r}, which does not exist; save it again"
        )
    return files


def _is_plain(name: str) -> bool:
    return name == os.path.basename(name) and name not in ("", ".", "..") and "\0" not in name


def _read_list(file: Path, key: str) -> list[Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"[data] path: {file} cannot be read: {str(error)[:100]}; save the data set again") from error
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not found:
        raise _not_saved(file, key)
    return found


def _not_saved(file: Path, what: str) -> UserError:
    return UserError(f"[data] path: {file} has no {what} as datasets' save_to_disk writes it; save the data set again")


def load_parquet(patterns: list[str]) -> datasets.Dataset:
    """Load parquet files, which `datasets` copies once into its cache. Files without rows are left out.

    Raises:
        UserError: A file is damaged, or has other columns than the rest.
    """
    files = _matching(patterns)  # not those at addresses
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
                _read_through(file)
        raise


def _matching(patterns: list[str]) -> list[str]:
    return sorted(file for pattern in patterns for file in glob.glob(pattern, recursive=True))


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
    try:
        return int(parquet.read_metadata(file).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _read_through(file: str) -> None:
    try:
        for _ in parquet.ParquetFile(file).iter_batches(64):
            pass
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:150]
    return UserError(f"[data] path: cannot load {file!r}: {reason}; write the file again or leave it out")


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

    Raises:
        UserError: The image column does not hold images.
    """
    table = table.select_columns([image, *([label] if label and label != image else [])])
    if table.features[image] == datasets.Image(decode=False):
        return table
    if table.features[image] == datasets.Value("binary_view"):
        table = table.cast_column(image, datasets.Value("large_binary"))
    feature = table.features[image]
    if getattr(feature, "dtype", "") in TEXT:
        _refuse_text(image, table[image])
    if getattr(feature, "dtype", "") in ("binary", "large_binary"):
        _refuse_text(image, (value and value[:200].decode("latin-1") for value in table[image]))
    if isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Value):
        raise UserError(
            f"[data] image_column: {image!r} holds lists of numbers, not encoded images; convert each to bytes, by "
            "bytes(numbers), if they are those of an image file, or else to an image, by PIL.Image.fromarray"
        )
    try:
        return table.cast_column(image, datasets.Image(decode=False))
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise UserError(f"[data] image_column: {image!r} holds {table.features[image]}, not images") from error


def _refuse_text(image: str, values: Iterable[Any]) -> None:
    """Refuse a column of text that does not name files, judging by its first row that is not empty."""
    text = next((value for value in values if value), None)
    if isinstance(text, str) and (problem := text_problem(text)):
        raise UserError(f"[data] image_column: {image!r} holds {problem}")


def text_problem(text: str) -> str:
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


def label_text(value: Any, names: list[str], row: int) -> str:
    """A label as text: the name of its class, or its number if classes have no names.

    Raises:
        UserError: It belongs to no class (such as -1, which marks images without a label), or is several labels or a
            measurement.
    """
    where = f"[data] label_column: row {row} has the label"
    if is_missing(value):
        raise UserError(f"{where} None, which is of no class; leave unlabelled rows out")
    if names:
        if type(value) is int and 0 <= value < len(names):
            return str(names[value])
        raise UserError(f"{where} {value!r:.50}, which is of no class; leave unlabelled rows out")
    if isinstance(value, float):
        if not value.is_integer():
            raise UserError(
                f"{where} {value!r}, a number with a fraction; evaluation needs classes: name another column "
                "(--label-column), or write class names"
            )
        return str(int(value))
    if isinstance(value, list | dict):
        raise UserError(
            f"{where} {value!r:.50}, {'several classes' if isinstance(value, list) else 'a structure'}; "
            "evaluation needs one class a row: name another column (--label-column), or write one class name a row"
        )
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
