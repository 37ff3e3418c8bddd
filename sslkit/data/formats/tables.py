"""Tables of strangers, of which only the columns of images and labels are looked at."""

import base64
import glob
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import pyarrow as pa
from pyarrow import parquet

from sslkit.data.formats.hints import image_suffix
from sslkit.errors import UserError

TEXT = ("string", "large_string", "string_view")


def map_arrow(patterns: list[str], files: list[str] | None = None) -> datasets.Dataset:
    """The rows of Arrow files where they lie, without the copy that `datasets` makes of other files.

    Args:
        patterns: Of the files.
        files: The files themselves, in their order; None: those that the patterns name, sorted.

    Raises:
        UserError: One of them is no such file, or broken.
        ValueError: There are none.
    """
    tables = []
    for file in _named_by(patterns) if files is None else files:
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
    if table.features[image] == datasets.Value("binary_view"):
        table = table.cast_column(image, datasets.Value("large_binary"))
    feature = table.features[image]
    if getattr(feature, "dtype", "") in TEXT:
        _refuse_text(image, table[image])
    if getattr(feature, "dtype", "") in ("binary", "large_binary"):
        _refuse_text(image, (value and value[:200].decode("latin-1") for value in table[image]))
    if isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Value):
        raise UserError(
            f"[data] image_column: {image!r} holds lists of numbers, not encoded images; write each as bytes, by "
            "bytes(numbers), if they are those of an image file, or else as an image, by PIL.Image.fromarray"
        )
    try:
        return table.cast_column(image, datasets.Image(decode=False))
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise UserError(f"[data] image_column: {image!r} holds {table.features[image]}, not images") from error


def _refuse_text(image: str, values: Iterable[Any]) -> None:
    """Refuse a column of text that is not the names of files, by its first row that is not empty."""
    text = next((value for value in values if value), None)
    if not isinstance(text, str):
        return
    if kind := what_text(text):
        raise UserError(f"[data] image_column: {image!r} holds {kind}")


def what_text(text: str) -> str:
    """What a text is that should be an image or the name of a file, and what to do; empty for what may be a name."""
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
    """Whether a label is none: null, not a number, or empty text."""
    return value is None or value != value or (isinstance(value, str | bytes) and not value.strip())


def label_word(value: Any, names: list[str], row: int) -> str:
    """A label as a word: its class's name, or the number where classes have none.

    Raises:
        UserError: It is of no class, as -1 is, which marks images without a label, or it is several or a measurement.
    """
    where = f"[data] label_column: row {row} has"
    if is_missing(value):
        raise UserError(f"{where} the label None, which is of no class; leave unlabelled rows out")
    if names:
        if type(value) is int and 0 <= value < len(names):
            return str(names[value])
        raise UserError(f"{where} the label {value!r:.50}, which is of no class; leave unlabelled rows out")
    if isinstance(value, float):
        if not value.is_integer():
            raise UserError(
                f"{where} the label {value!r}, a number with a fraction; evaluation needs classes: name another column "
                "(--label-column), or write class names"
            )
        return str(int(value))
    if isinstance(value, list | dict):
        raise UserError(
            f"{where} the label {value!r:.50}, {'several classes' if isinstance(value, list) else 'a structure'}; "
            "evaluation needs one class a row: name another column (--label-column), or write one class name a row"
        )
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
