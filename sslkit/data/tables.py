"""Tables of strangers, of which only the columns of images and labels are looked at."""

import glob
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import pyarrow as pa
from pyarrow import parquet

from sslkit.errors import UserError


def map_arrow(patterns: list[str]) -> datasets.Dataset:
    """The rows of Arrow files where they lie, without the copy that `datasets` makes of other files.

    Raises:
        UserError: One of them is no such file, or broken.
        ValueError: There are none.
    """
    tables = []
    for file in _named_by(patterns):
        try:
            table = datasets.Dataset.from_file(file)
            table.data.validate(full=True)  # a stranger's offsets may point anywhere
        except pa.ArrowInvalid as error:  # Arrow's other kind of file, or none
            if not _is_arrow_file(file):
                raise _broken(file, error) from error
            return datasets.load_dataset("arrow", data_files={"split": patterns}, split="split")
        except OSError as error:
            raise _broken(file, error) from error
        tables.append(table)
    if not tables:
        raise ValueError("no such file")
    return datasets.concatenate_datasets(tables)


def _is_arrow_file(file: str) -> bool:
    with open(file, "rb") as stream:
        return stream.read(6) == b"ARROW1"


def load_parquet(patterns: list[str]) -> datasets.Dataset:
    """The rows of parquet files, which `datasets` copies once into its cache; files without a row are left out.

    Raises:
        UserError: One of them is broken, or has other columns than the rest.
    """
    files = _named_by(patterns)  # not those elsewhere, by an address
    filled = [file for file in files if _rows_of(file)]
    if files and not filled:
        raise UserError(f"[data] path: {files[0]!r} holds no rows")
    if len(filled) < len(files):
        patterns = [*(pattern for pattern in patterns if "://" in pattern), *map(glob.escape, filled)]
    try:
        with _quiet():
            return datasets.load_dataset("parquet", data_files={"split": patterns}, split="split")
    except Exception:  # what `datasets` says does not tell the file
        if filled:
            _check_alike(filled)
            for file in filled:
                _read_through(file)
        raise


def _named_by(patterns: list[str]) -> list[str]:
    return sorted(file for pattern in patterns for file in glob.glob(pattern, recursive=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """`datasets` writes of a broken file on the screen before it raises what we say in a sentence."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _rows_of(file: str) -> int:
    try:
        return int(parquet.read_metadata(file).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise _broken(file, error) from error


def _read_through(file: str) -> None:
    try:
        for _ in parquet.ParquetFile(file).iter_batches(64):
            pass
    except (pa.ArrowException, OSError) as error:
        raise _broken(file, error) from error


def _broken(file: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:150]
    return UserError(f"[data] path: cannot load {file!r}: {reason}; write the file again or leave it out")


def _check_alike(files: list[str]) -> None:
    """See that the files have the same columns, of the same types where they cannot be changed into each other."""
    first = parquet.read_schema(files[0])
    for file in files[1:]:
        schema = parquet.read_schema(file)
        if set(schema.names) != set(first.names):
            raise UserError(
                f"[data] path: {file!r} has the columns {schema.names[:8]}, but {files[0]!r} has {first.names[:8]}; "
                "give files of one kind, or a [[data.mix]] table for each kind"
            )
        for name in first.names:
            if pa.types.is_nested(schema.field(name).type) != pa.types.is_nested(first.field(name).type):
                raise UserError(
                    f"[data] path: the column {name!r} is {schema.field(name).type} in {file!r}, but "
                    f"{first.field(name).type} in {files[0]!r}; give files of one kind, or a [[data.mix]] table for "
                    "each kind"
                )


def only_columns(table: datasets.Dataset, image: str, label: str | None) -> datasets.Dataset:
    """The columns of images, not decoded, and labels: others could want libraries that are not here.

    Raises:
        UserError: The first is not one of images.
    """
    table = table.select_columns([image, *([label] if label and label != image else [])])
    if table.features[image] == datasets.Image(decode=False):
        return table
    try:
        return table.cast_column(image, datasets.Image(decode=False))
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise UserError(f"[data] image_column: {image!r} holds {table.features[image]}, not images") from error


def label_word(value: Any, names: list[str], row: int) -> str:
    """A label as a word: its class's name, or the number where classes have none.

    Raises:
        UserError: It is of no class, as -1 is, which marks images without a label.
    """
    if not names and value is not None:
        return str(value)
    if type(value) is int and 0 <= value < len(names):
        return str(names[value])
    raise UserError(
        f"[data] label_column: row {row} has the label {value!r:.50}, which is of no class; leave unlabelled rows out"
    )
