"""Rows of parquet files, read row group by row group where the files are: on this machine, at an address or on the Hub.

Nothing is copied to disk. The footers state the rows of each row group; `stream_order` reads few groups at a time.
"""

import glob
import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import datasets
import fsspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.formats.folder_listing import printable
from sslkit.errors import UserError, first_line
from sslkit.text import pluralize

MAX_GROUP = 2**31  # bytes of the images of a row group, all of which are held in memory
WAITS = (1.0, 4.0, 16.0, 32.0)  # seconds before each retry of a remote file, besides the retries of its library
READERS = 16  # footers read at the same time
MIN_SAMPLED_GROUPS = 16
HELD = 4  # row groups kept in memory by default


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file."""

    file: int  # index of its file
    number: int  # its number in the file
    rows: int
    bytes: int  # uncompressed size of its images


class StreamedTable:
    """The rows of parquet files at paths or addresses (``hf://datasets/user/name/file.parquet``); an `ImageTable`."""

    random_access: ClassVar[bool] = False

    def __init__(
        self, files: list[str], footers: list[parquet.FileMetaData], image_column: str, label_column: str | None = None
    ) -> None:
        self.files, self.footers = files, footers
        self.image_column, self.label_column = image_column, label_column
        self.label_feature = features_of(files[0], footers[0])[label_column] if label_column else None
        self.groups = [
            group for file, footer in enumerate(footers) for group in _groups(files, file, footer, image_column)
        ]
        # Index of the first row of each row group, and the number of rows.
        self.starts = np.cumsum([0, *(group.rows for group in self.groups)], dtype=np.int64)
        self.picked: NDArray[np.int64] | None = None  # the rows that were selected; None for all
        self._capacity, self._held = HELD, dict[int, tuple[pa.Array, int]]()

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.picked is None else len(self.picked)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of rows of each row group."""
        return tuple(group.rows for group in self.groups)

    def cell(self, row: int) -> dict[str, Any]:
        """See `ImageTable`. A remote file that can no longer be read raises `UserError`."""
        group, offset = self._locate(row)
        images = self._read(group)
        if offset >= len(images):
            raise UnreadableImage(self.name(row), "the row group has fewer rows than the footer of the file states")
        value = images[offset].as_py()
        encoded = value if isinstance(value, bytes) else (value or {}).get("bytes")
        if encoded is None:
            raise UnreadableImage(self.name(row), "the row holds no image; a stream does not open files that rows name")
        return {"bytes": encoded, "path": self.name(row)}

    def name(self, row: int) -> str:
        """See `ImageTable`; nothing is read."""
        number, offset = self._locate(row)
        group = self.groups[number]
        return f"row {offset} of row group {group.number} of {printable(self.files[group.file])}"

    def paths(self) -> list[str]:
        """See `ImageTable`."""
        return [""] * len(self)

    def cells(self, batch_size: int) -> Iterator[pa.StructArray]:
        """See `ImageTable`."""
        for start in range(0, len(self), batch_size):
            rows = range(start, min(start + batch_size, len(self)))
            yield pa.array([self.cell(row) for row in rows], datasets.Image().pa_type)

    def labels(self, rows: Sequence[int] | None = None) -> list[Any]:
        """See `ImageTable`; the images are not read."""
        tables = [self._fetch(file, [self.label_column or ""], None) for file in range(len(self.files))]
        values = [value for table in tables for value in table.column(0).to_pylist()]
        if self.picked is not None:
            values = [values[row] for row in self.picked.tolist()]
        return values if rows is None else [values[row] for row in rows]

    def select(self, rows: NDArray[np.int64]) -> Self:
        """See `ImageTable`."""
        chosen = copy(self)
        chosen.picked = np.asarray(rows) if self.picked is None else self.picked[rows]
        return chosen

    def without_labels(self) -> Self:
        """See `ImageTable`."""
        chosen = copy(self)
        chosen.label_column = chosen.label_feature = None
        return chosen

    def holding(self, groups: int) -> Self:
        """See `ImageTable`."""
        chosen = copy(self)
        chosen._capacity, chosen._held = groups, {}
        return chosen

    def sample(self, count: int, seed: int) -> NDArray[np.int64]:
        """See `ImageTable`; the rows are in few row groups, each of which is read once."""
        rng = np.random.default_rng(seed)
        if self.picked is not None:
            return rng.permutation(len(self))[:count]
        pool: list[NDArray[np.int64]] = []
        for group in rng.permutation(len(self.groups)):
            if len(pool) >= MIN_SAMPLED_GROUPS and sum(map(len, pool)) >= count:
                break
            pool.append(np.arange(self.starts[group], self.starts[group + 1]))
        return np.sort(rng.permutation(np.concatenate(pool))[:count])

    def describe_streaming(self, groups: int) -> str:
        """See `ImageTable`."""
        count = len(self.groups)
        size = sum(group.bytes for group in self.groups) / count / 2**20
        return (
            f"read as a stream: {pluralize(count, 'row group')} of {pluralize(len(self.files), 'file')}, "
            f"about {size:.3g} MiB each, of which a worker holds up to {min(groups, count)}"
        )

    def digest(self) -> str:
        """SHA-256 of the files' names, and of the number of rows and bytes of each row group."""
        digest = hashlib.sha256(str(len(self)).encode())
        for group in self.groups:
            name = self.files[group.file].rpartition("/")[2]
            digest.update(f"{name}\0{group.rows}\0{group.bytes}\0".encode())
        if self.picked is not None:
            digest.update(self.picked.astype(np.int64).tobytes())
        return digest.hexdigest()

    def as_dataset(self) -> datasets.Dataset:
        """See `ImageTable`."""
        raise UserError("[data] streaming: a stream cannot be mixed with other sources; leave streaming out")

    def _locate(self, row: int) -> tuple[int, int]:
        """The row group of a row, and its offset in it."""
        index = row if self.picked is None else int(self.picked[row])
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        return group, index - int(self.starts[group])

    def _read(self, group: int) -> pa.Array:
        """The images of a row group, as they are stored. Kept until as many images were read, if there is room."""
        images, left = self._held.pop(group, (None, self.groups[group].rows))
        if images is None:
            chosen = self.groups[group]
            images = self._fetch(chosen.file, [self.image_column], chosen.number).column(0).combine_chunks()
        if left > 1:
            self._held[group] = images, left - 1  # the most recently used is the last
        while len(self._held) > self._capacity:
            with suppress(StopIteration, KeyError, RuntimeError):  # another thread was faster
                del self._held[next(iter(self._held))]
        return images

    def _fetch(self, file: int, columns: list[str], group: int | None) -> pa.Table:
        """Columns of a row group of a file, or of the whole file."""
        name, where = self.files[file], "" if group is None else f"row group {group} of "
        if columns == [self.image_column] and (leaf := f"{self.image_column}.bytes") in _leaves(self.footers[file]):
            columns = [leaf]
        waits = iter(WAITS if "://" in name else ())
        while True:
            try:
                with _open(name) as stream:
                    reader = parquet.ParquetFile(stream, metadata=self.footers[file], pre_buffer=False)
                    if group is None:
                        return reader.read(columns, use_threads=False)
                    return reader.read_row_group(group, columns, use_threads=False)
            except (pa.ArrowException, ValueError, KeyError) as error:
                raise UnreadableImage(f"{where}{printable(name)}", f"damaged: {first_line(error)}") from error
            except Exception as error:  # its type depends on the library that reads the address
                if (wait := next(waits, None)) is not None:
                    time.sleep(wait)
                    continue
                if "://" not in name:
                    raise UnreadableImage(f"{where}{printable(name)}", first_line(error)) from error
                raise UserError(
                    f"[data] path: {printable(name)} can no longer be read: {first_line(error)}; saved work is "
                    "intact, and the same command continues the run"
                ) from error


def match_files(pattern: str) -> list[str]:
    """The files that a local pattern or one of an address matches, sorted."""
    if "://" not in pattern:
        return sorted(glob.glob(pattern, recursive=True))
    try:
        system, path = fsspec.core.url_to_fs(pattern)
        return sorted(map(system.unstrip_protocol, system.glob(path) if "*" in path else [path]))
    except Exception as error:  # unknown protocol, missing library, server that does not answer
        raise UserError(f"[data] data_files: cannot list {printable(pattern)}: {first_line(error)}") from error


def read_footers(files: list[str]) -> list[parquet.FileMetaData]:
    """Read the footer of each file. One that is no parquet file, or cannot be reached, raises `UserError`."""
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(_footer, files))


def _footer(file: str) -> parquet.FileMetaData:
    try:
        with _open(file) as stream:
            return parquet.read_metadata(stream)
    except Exception as error:  # its type depends on the library that reads the address
        raise UserError(f"[data] path: {printable(file)} cannot be read as parquet: {first_line(error)}") from error


def _open(file: str) -> Any:
    """Open a local or remote file; only the requested bytes of a remote file are read."""
    if "://" not in file:
        return open(file, "rb")
    system, path = fsspec.core.url_to_fs(file)
    return system.open(path, "rb", cache_type="none")


def features_of(file: str, footer: parquet.FileMetaData) -> datasets.Features:
    """Columns and their types, as `datasets` describes them. Invalid ones raise `UserError`."""
    try:
        return datasets.Features.from_arrow_schema(footer.schema.to_arrow_schema())
    except Exception as error:  # untrusted metadata can make `datasets` raise anything
        raise UserError(f"[data] path: the columns of {printable(file)} are invalid: {first_line(error)}") from error


def _groups(files: list[str], file: int, footer: parquet.FileMetaData, column: str) -> Iterator[RowGroup]:
    """The row groups of a file that have rows. Refuse a column that does not hold images, and too large groups."""
    name, schema = printable(files[file]), footer.schema.to_arrow_schema()
    if column not in schema.names:
        raise UserError(f"[data] image_column: {name} has no column {column!r}; there are {schema.names}")
    kind = schema.field(column).type
    held = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if str(held) not in ("binary", "large_binary", "binary_view"):
        is_text = str(held) in ("string", "large_string", "string_view")
        advice = "; leave streaming out for names of files or other text" if is_text else ""
        raise UserError(f"[data] image_column: {column!r} of {name} holds {kind}, not the bytes of images{advice}")
    leaves = [index for index, leaf in enumerate(_leaves(footer)) if leaf in (column, f"{column}.bytes")]
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        size = sum(group.column(leaf).total_uncompressed_size for leaf in leaves)
        if size > MAX_GROUP:
            raise UserError(
                f"[data] path: {name} has a row group of {size / 2**30:.1f} GiB, which must fit into memory as a "
                "whole; write it with smaller ones (such as 1000 rows), or leave streaming out"
            )
        if group.num_rows:
            yield RowGroup(file, number, group.num_rows, size)


def _leaves(footer: parquet.FileMetaData) -> list[str]:
    """The columns as they are stored; a structure is stored as several."""
    return [footer.schema.column(index).path for index in range(footer.num_columns)]
