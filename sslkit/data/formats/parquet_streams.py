"""Rows of parquet files where they lie, here or on the Hub: a row group is read when one of its images is due.

Nothing is copied to this machine's disk. How many rows each group has is in the end of each file, so that any row can
be named, counted and found again; `sslkit.data.order.stream_order` keeps to few groups at a time.
"""

import glob
import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from sslkit.data.config import SourceConfig
from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.formats.folder_listing import printable
from sslkit.data.formats.splits import ALL, choose, no_such_split, refuse_several
from sslkit.errors import UserError
from sslkit.hub.availability import quiet_hub, unavailable_reason

MAX_GROUP = 2**31  # bytes of images in a row group, all of which must be held
WAITS = (1.0, 4.0, 16.0, 32.0)  # seconds before another try, where a file is elsewhere; its library tries by itself too
READERS = 16  # ends of files read at the same time
DRAWN = 16  # row groups, at least, that a sample is of
HELD = 4  # row groups kept where nobody says how many


@dataclass(frozen=True)
class RowGroup:
    """A row group: the number of its file, its own number there, its rows, and the bytes of its images unpacked."""

    file: int
    place: int
    rows: int
    bytes: int


class StreamedRows:
    """Rows of parquet files, of which `sslkit.data.sources.image_source` asks as it asks `datasets`' tables.

    Attributes:
        files: Paths, or addresses such as ``hf://datasets/user/name@commit/file.parquet``.
        footers: What the end of each says.
        image_column: The column of images.
        groups: All row groups, in order.
        starts: The row that each begins with, and how many rows there are.
        features: Columns and their types, as `datasets` has them.
    """

    def __init__(self, files: list[str], footers: list[parquet.FileMetaData], image_column: str) -> None:
        self.files, self.footers, self.image_column = files, footers, image_column
        self.features = features_of(files[0], footers[0])
        self.groups = [
            group for file, footer in enumerate(footers) for group in _groups(files, file, footer, image_column)
        ]
        self.starts = np.cumsum([0, *(group.rows for group in self.groups)], dtype=np.int64)
        self.picked: NDArray[np.int64] | None = None
        self._capacity, self._held = HELD, dict[int, tuple[pa.Array, int]]()

    @property
    def num_rows(self) -> int:
        """How many rows."""
        return int(self.starts[-1]) if self.picked is None else len(self.picked)

    @property
    def column_names(self) -> list[str]:
        """The columns, also those that nobody reads."""
        return list(self.features)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each group."""
        return tuple(group.rows for group in self.groups)

    @property
    def group_bytes(self) -> float:
        """Bytes of the images of a row group."""
        return sum(group.bytes for group in self.groups) / len(self.groups)

    def __getitem__(self, which: int | str) -> Any:
        """The image of a row, as a cell of its bytes; or a whole column, whose images are not read for it.

        Raises:
            UnreadableImage: There is none, or the file is damaged there.
            UserError: The file is elsewhere, and not to be reached any more.
        """
        if isinstance(which, str):
            return self._column(which)
        group, row = self._place(which)
        cells = self._read(group)
        if row >= len(cells):
            raise UnreadableImage(self.name(which), "the row group has fewer rows than the end of the file says")
        cell = cells[row].as_py()
        encoded = cell if isinstance(cell, bytes) else (cell or {}).get("bytes")
        if encoded is None:
            raise UnreadableImage(self.name(which), "the row holds no image; a stream opens no files that rows name")
        return {self.image_column: {"bytes": encoded, "path": self.name(which)}}

    def name(self, index: int) -> str:
        """What to call a row in print; nothing is read for it."""
        group, row = self._place(index)
        piece = self.groups[group]
        return f"row {row} of row group {piece.place} of {printable(self.files[piece.file])}"

    def select(self, rows: NDArray[np.int64]) -> "StreamedRows":
        """The rows at these positions, in that order."""
        chosen = copy(self)
        chosen.picked = np.asarray(rows) if self.picked is None else self.picked[rows]
        return chosen

    def select_columns(self, names: list[str]) -> "StreamedRows":
        """The same rows with these columns."""
        chosen = copy(self)
        chosen.features = datasets.Features({name: self.features[name] for name in names})
        return chosen

    def holding(self, groups: int) -> "StreamedRows":
        """The same rows, of which so many row groups are kept in memory."""
        chosen = copy(self)
        chosen._capacity, chosen._held = groups, {}
        return chosen

    def draw(self, count: int, seed: int) -> NDArray[np.int64]:
        """Positions of at most so many rows, of few row groups, which are read once for all of them."""
        rng = np.random.default_rng(seed)
        if self.picked is not None:
            return rng.permutation(self.num_rows)[:count]
        pool: list[NDArray[np.int64]] = []
        for group in rng.permutation(len(self.groups)):
            if len(pool) >= DRAWN and sum(map(len, pool)) >= count:
                break
            pool.append(np.arange(self.starts[group], self.starts[group + 1]))
        return np.sort(rng.permutation(np.concatenate(pool))[:count])

    def words(self, held: int) -> str:
        """A sentence on what a worker that keeps so many row groups needs."""
        size, count = self.group_bytes / 2**20, len(self.groups)
        return (
            f"read as a stream: {count} row groups of {len(self.files)} file(s), about {size:.3g} MiB each, of which a "
            f"worker holds up to {min(held, count)}"
        )

    def digest(self) -> str:
        """SHA-256 of the files' names, and of the rows and bytes of each row group."""
        digest = hashlib.sha256(str(self.num_rows).encode())
        for group in self.groups:
            name = PurePosixPath(self.files[group.file]).name
            digest.update(f"{name}\0{group.rows}\0{group.bytes}\0".encode())
        if self.picked is not None:
            digest.update(self.picked.astype(np.int64).tobytes())
        return digest.hexdigest()

    def _place(self, index: int) -> tuple[int, int]:
        """Row group of a row, and its place there."""
        row = index if self.picked is None else int(self.picked[index])
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        return group, row - int(self.starts[group])

    def _read(self, group: int) -> pa.Array:
        """The images of a row group, as they are stored: kept until each was asked for once, if there is room."""
        cells, left = self._held.pop(group, (None, self.groups[group].rows))
        if cells is None:
            piece = self.groups[group]
            cells = self._fetch(piece.file, [self.image_column], piece.place).column(0).combine_chunks()
        if left > 1:
            self._held[group] = cells, left - 1  # the last is the one used last
        while len(self._held) > self._capacity:
            with suppress(StopIteration, KeyError, RuntimeError):  # another thread was faster
                del self._held[next(iter(self._held))]
        return cells

    def _column(self, name: str) -> list[Any]:
        tables = [self._fetch(file, [name], None) for file in range(len(self.files))]
        values = [value for table in tables for value in table.column(0).to_pylist()]
        return values if self.picked is None else [values[row] for row in self.picked.tolist()]

    def _fetch(self, file: int, columns: list[str], place: int | None) -> pa.Table:
        """Columns of a row group of a file, or of all of them."""
        name, where = self.files[file], "" if place is None else f"row group {place} of "
        if columns == [self.image_column] and (leaf := f"{self.image_column}.bytes") in _leaves(self.footers[file]):
            columns = [leaf]
        waits = iter(WAITS if "://" in name else ())
        while True:
            try:
                with _opened(name) as stream:
                    reader = parquet.ParquetFile(stream, metadata=self.footers[file], pre_buffer=False)
                    if place is None:
                        return reader.read(columns, use_threads=False)
                    return reader.read_row_group(place, columns, use_threads=False)
            except (pa.ArrowException, ValueError, KeyError) as error:
                raise UnreadableImage(f"{where}{printable(name)}", f"damaged: {_brief(error)}") from error
            except Exception as error:  # of which library it is depends on where the file lies
                if (wait := next(waits, None)) is not None:
                    time.sleep(wait)
                    continue
                if "://" not in name:
                    raise UnreadableImage(f"{where}{printable(name)}", _brief(error)) from error
                raise UserError(
                    f"[data] path: {printable(name)} cannot be read any more: {_brief(error)}; what is saved is whole, "
                    "and the same command continues"
                ) from error


def find_parquet(config: SourceConfig, patterns: list[str]) -> list[str]:
    """The parquet files that a source names, in order: here, at addresses, or of a dataset of the Hub.

    Args:
        config: The source.
        patterns: Of files here or at addresses; none: the source is of the Hub.

    Raises:
        UserError: There are none, or the dataset is of files of another kind.
    """
    if not patterns:
        return _hub_files(config)
    found: list[str] = []
    for pattern in patterns:
        if "://" not in pattern:
            found += sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
            continue
        try:
            system, path = fsspec.core.url_to_fs(pattern)
            found += sorted(map(system.unstrip_protocol, system.glob(path) if "*" in path else [path]))
        except Exception as error:  # a protocol unknown, a library not here, a server that does not answer
            raise UserError(f"[data] data_files: cannot look for {printable(pattern)}: {_brief(error)}") from error
    refuse_several(found, patterns, config.split)
    if not found:
        raise UserError(f"[data] path: no parquet file is named by {', '.join(map(printable, patterns))}")
    return found


def read_footers(files: list[str]) -> list[parquet.FileMetaData]:
    """What the end of each file says of its row groups.

    Raises:
        UserError: One is no parquet file, or cannot be reached.
    """
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(_footer, files))


def _footer(file: str) -> parquet.FileMetaData:
    try:
        with _opened(file) as stream:
            return parquet.read_metadata(stream)
    except Exception as error:  # of which library it is depends on where the file lies
        raise UserError(f"[data] path: {printable(file)} cannot be read as parquet: {_brief(error)}") from error


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    """A file here or elsewhere, of which only what is asked for is read."""
    if "://" not in file:
        with open(file, "rb") as stream:
            yield stream
        return
    system, path = fsspec.core.url_to_fs(file)
    with system.open(path, "rb", cache_type="none") as stream:
        yield stream


def _hub_files(config: SourceConfig) -> list[str]:
    try:
        with quiet_hub():
            builder = datasets.load_dataset_builder(
                config.path, config.name, data_dir=config.data_dir, data_files=config.data_files
            )
        files = builder.config.data_files or {}
    except Exception as error:  # what a stranger's repository makes of `datasets` is no closed set
        raise UserError(
            f"[data] path: cannot stream {config.path!r}: no folder of that name here, and as a dataset of the Hub: "
            f"{_brief(error)}{unavailable_reason()}"
        ) from error
    if builder.name != "parquet":
        raise UserError(
            f"[data] streaming: {config.path!r} is not made of parquet files; leave streaming out to download it"
        )
    there = {str(name): [str(file) for file in each] for name, each in files.items()}
    words = list(there) if config.split == ALL else choose(there, config.split)
    if not words:
        raise no_such_split(config.path, "the splits", there, config.split)
    return [file for word in words for file in there[word]]


def features_of(file: str, footer: parquet.FileMetaData) -> datasets.Features:
    """Columns and their types, as `datasets` has them.

    Raises:
        UserError: They are not understood.
    """
    try:
        return datasets.Features.from_arrow_schema(footer.schema.to_arrow_schema())
    except Exception as error:  # what a stranger's metadata makes of `datasets` is no closed set
        raise UserError(f"[data] path: the columns of {printable(file)} are not understood: {_brief(error)}") from error


def _groups(files: list[str], file: int, footer: parquet.FileMetaData, column: str) -> Iterator[RowGroup]:
    """The row groups of a file that have rows, once its column of images is found to be one."""
    name, schema = printable(files[file]), footer.schema.to_arrow_schema()
    if column not in schema.names:
        raise UserError(f"[data] image_column: {name} has no column {column!r}; there are {schema.names}")
    kind = schema.field(column).type
    held = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(held) or pa.types.is_large_binary(held) or pa.types.is_binary_view(held)):
        text = pa.types.is_string(held) or pa.types.is_large_string(held) or pa.types.is_string_view(held)
        rest = "; leave streaming out for names of files or other text" if text else ""
        raise UserError(f"[data] image_column: {column!r} of {name} holds {kind}, not the bytes of images{rest}")
    wanted = {column, f"{column}.bytes"}
    leaves = [place for place, leaf in enumerate(_leaves(footer)) if leaf in wanted]
    for place in range(footer.num_row_groups):
        group = footer.row_group(place)
        size = sum(group.column(leaf).total_uncompressed_size for leaf in leaves)
        if size > MAX_GROUP:
            raise UserError(
                f"[data] path: {name} has a row group of {size / 2**30:.1f} GiB, which must be held whole; write it in "
                "smaller ones (such as 1000 rows), or leave streaming out"
            )
        if group.num_rows:
            yield RowGroup(file, place, group.num_rows, size)


def _leaves(footer: parquet.FileMetaData) -> list[str]:
    """The columns as they are stored, in order; a structure is several."""
    return [footer.schema.column(place).path for place in range(footer.num_columns)]


def _brief(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
