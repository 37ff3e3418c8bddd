"""The protocol of tables of encoded images, and the table of a `datasets.Dataset`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sslkit.data.formats.folder_listing import printable


class ImageTable(Protocol):
    """Rows of encoded images and, if any, their labels. Implemented by `MappedTable` and `StreamedTable`.

    The bodies here are those of tables whose rows can be read one by one.
    """

    @property
    def random_access(self) -> bool:
        """Whether reading a row reads no more than this row."""
        return True

    @property
    def label_column(self) -> str | None:
        """Name of the label column, or None."""

    @property
    def label_feature(self) -> Any:
        """Type of the labels, as `datasets` describes it; None without labels."""

    def __len__(self) -> int: ...

    def cell(self, row: int) -> dict[str, Any]:
        """An image as `datasets` stores it: ``bytes`` or None, and ``path`` or None."""

    def name(self, row: int) -> str:
        """Printable name of an image; empty if it has none."""
        return printable(self.cell(row).get("path") or "")

    def paths(self) -> list[str]:
        """The file of each image, as `to_text` writes it; empty where there is none."""
        return [path or "" for cells in self.cells(1024) for path in cells.field("path").to_pylist()]

    def cells(self, batch_size: int) -> Iterator[pa.StructArray]:
        """All images as Arrow structures of ``bytes`` and ``path``, ``batch_size`` at a time."""

    def labels(self, rows: Sequence[int] | None = None) -> list[Any]:
        """Values of the label column for ``rows``, or for all rows."""

    def select(self, rows: NDArray[np.int64]) -> Self:
        """The given rows, in this order."""

    def without_labels(self) -> Self:
        """The same images without labels."""

    def holding(self, groups: int) -> Self:
        """The same rows; up to ``groups`` row groups are kept in memory. Changes nothing if there are no row groups."""
        return self

    def sample(self, count: int, seed: int) -> NDArray[np.int64]:
        """At most ``count`` random rows that are cheap to read together."""
        return np.random.default_rng(seed).permutation(len(self))[:count]

    def digest(self) -> str:
        """SHA-256 that identifies the images without reading them; empty if only names or content identify them."""
        return ""

    def describe_streaming(self, groups: int) -> str:
        """A sentence on the memory of a worker that keeps so many row groups; empty if there are none."""
        return ""

    def as_dataset(self) -> datasets.Dataset:
        """A `datasets` table with the images in a column ``image``, not decoded. A stream raises `UserError`."""


@dataclass(frozen=True)
class MappedTable(ImageTable):
    """A table that `datasets` maps into memory; images are not decoded by `datasets`."""

    rows: datasets.Dataset
    image_column: str = "image"
    label_column: str | None = None

    @property
    def label_feature(self) -> Any:
        """See `ImageTable`."""
        return self.rows.features[self.label_column] if self.label_column else None

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def cell(self, row: int) -> dict[str, Any]:
        """See `ImageTable`."""
        return self.rows[row][self.image_column] or {}

    def cells(self, batch_size: int) -> Iterator[pa.StructArray]:
        """See `ImageTable`."""
        for batch in self.rows.select_columns([self.image_column]).with_format("arrow").iter(batch_size):
            yield batch[self.image_column].combine_chunks()

    def labels(self, rows: Sequence[int] | None = None) -> list[Any]:
        """See `ImageTable`."""
        return list(self.rows[self.label_column] if rows is None else self.rows[rows][self.label_column])

    def select(self, rows: NDArray[np.int64]) -> Self:
        """See `ImageTable`."""
        return replace(self, rows=self.rows.select(rows))

    def without_labels(self) -> Self:
        """See `ImageTable`."""
        return replace(self, rows=self.rows.select_columns([self.image_column]), label_column=None)

    def as_dataset(self) -> datasets.Dataset:
        """See `ImageTable`."""
        rows = self.rows.select_columns([self.image_column])
        return rows if self.image_column == "image" else rows.rename_column(self.image_column, "image")
