"""The images of a run or an evaluation, wherever they lie, one source or several.

`datasets` does the finding, typing and memory-mapping. Images stay encoded until a worker decodes them.
"""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
from numpy.typing import NDArray
from pyarrow import compute

from sslkit.data.config import DataConfig, SourceConfig
from sslkit.data.decode.background import WHITE
from sslkit.data.decode.channels import decode_channels
from sslkit.data.decode.rgb import Pixels, Reduction, Size, UnreadableImage, decode_reduced, decode_rgb, read_file
from sslkit.data.formats.columns import choose_columns
from sslkit.data.formats.folder_listing import printable, span_of, to_path
from sslkit.data.formats.parquet_streams import StreamedRows, features_of, find_parquet, read_footers
from sslkit.data.formats.tables import is_missing, label_word, only_columns
from sslkit.data.order.mixture import Mixture
from sslkit.data.order.stream_order import Lanes
from sslkit.data.sources.find import available_splits, files_left_out, find_data, parquet_to_stream
from sslkit.data.sources.location import describe
from sslkit.errors import UserError, check_path

LOGGER = logging.getLogger("sslkit.data")
__all__ = ["DataConfig", "ImageSource", "available_splits", "files_left_out", "open_source"]


@dataclass(frozen=True)
class ImageSource:
    """A map-style collection of encoded images and, if any, their labels.

    Attributes:
        table: The `datasets` table, or a `StreamedRows`, which answers alike; images are not decoded by `datasets`.
        image_column: Name of the image column.
        label_column: Name of the label column, or None.
        description: How to name the source in print and errors.
        root: The folder below which all images lie, as `to_text` writes it; empty where they are no files of a folder.
        within: The folder that a local table's images may lie in, where its rows name files; empty: anywhere.
        plan: How samples make an epoch: in shares of several sources, or in a stream's lanes; None: each image once,
            in an order without bounds.
        channels: What images are read as: None for RGB of 8 bits, or so many channels of 16.
        unlabelled: What is wrong with the labels, or why there are none; empty if nothing is known.
        background: What transparent pixels of RGB are composited over; see `DataConfig`.
    """

    table: datasets.Dataset
    image_column: str
    label_column: str | None
    description: str
    root: str = ""
    within: str = ""
    plan: Mixture | Lanes | None = None
    channels: int | None = None
    unlabelled: str = ""
    background: str = WHITE

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def read(self, index: int) -> Pixels:
        """Decode image ``index`` to (H, W, 3) uint8 RGB, or to (H, W, channels) uint16.

        Raises:
            UnreadableImage: It cannot be.
        """
        return self.read_as(index, self.channels)

    def read_as(self, index: int, channels: int | None) -> Pixels:
        """Decode image ``index`` to so many channels, whatever ``channels`` says of the source; see `read`."""
        name, encoded = self.encoded(index)
        if channels is None:
            return decode_rgb(encoded, name, self.background)
        return decode_channels(encoded, name, channels)

    def read_reduced(self, index: int, reduction: Reduction) -> tuple[Pixels, Size]:
        """Image ``index`` as `decode_reduced` gives it, and height and width of the whole image; channels stay whole.

        Raises:
            UnreadableImage: It cannot be decoded.
        """
        return self.decode(*self.encoded(index), reduction)

    def decode(self, name: str, encoded: bytes, reduction: Reduction) -> tuple[Pixels, Size]:
        """What `read_reduced` gives, from what `encoded` gave."""
        if self.channels is None:
            return decode_reduced(encoded, name, reduction, self.background)
        whole = decode_channels(encoded, name, self.channels)
        return whole, whole.shape[:2]

    def encoded(self, index: int) -> tuple[str, bytes]:
        """The printable name of image ``index``, and its bytes as they are stored.

        Raises:
            UnreadableImage: There are none, or they cannot be read.
        """
        cell = self.table[index][self.image_column] or {}
        name = printable(cell.get("path") or f"image {index} of {self.description}")
        encoded = cell.get("bytes")
        if encoded is not None:
            return name, encoded
        if not cell.get("path"):
            raise UnreadableImage(name, "the row holds no image")
        path = Path(self.within, to_path(cell["path"]))  # a relative name is meant from the table
        if self.within and not path.resolve().is_relative_to(self.within):
            raise UnreadableImage(name, f"the row names a file outside of {self.within}, the folder of its table")
        try:
            return name, read_file(path, span_of(cell["path"]))
        except OSError as error:
            raise UnreadableImage(name, error.strerror or str(error)) from error

    def name(self, index: int) -> str:
        """What to call image ``index`` in print, on one line."""
        if isinstance(self.table, StreamedRows):
            return self.table.name(index)
        cell = self.table[index][self.image_column] or {}
        return printable(cell.get("path") or f"image {index} of {self.description}")

    def labels(self) -> list[str]:
        """The class of every image by name (or number, as text, where classes have no names).

        Raises:
            UserError: The source has none, or a row's is of no class.
        """
        if self.label_column is None or self.unlabelled:
            why = f": {self.unlabelled}" if self.unlabelled else ""
            raise UserError(
                f"{self.description} has no labels; evaluation needs a folder per class, a metadata.csv with "
                f"file_name and label beside the images, or [data] label_column (--label-column){why}"
            )
        names, values = self.class_names(), list(self.table[self.label_column])
        if missing := [row for row, value in enumerate(values) if is_missing(value)]:
            raise UserError(
                f"[data] label_column: {len(missing):,} of {len(values):,} images of {self.description} have no label; "
                f"row {missing[0]} has the label {values[missing[0]]!r}, which is of no class; leave unlabelled rows "
                f"out ({self.name(missing[0])})"
            )
        words = []
        for index, value in enumerate(values):
            try:
                words.append(label_word(value, names, index))
            except UserError as error:
                raise UserError(f"{error} ({self.name(index)})") from error
        return words

    def paths(self) -> list[str]:
        """The file every image came from, as `to_text` writes it; empty text where the data does not know."""
        if isinstance(self.table, StreamedRows):
            return [""] * len(self)
        batches = self.table.select_columns([self.image_column]).with_format("arrow").iter(1024)
        return [
            path or ""
            for batch in batches
            for path in batch[self.image_column].combine_chunks().field("path").to_pylist()
        ]

    def holds_names_alone(self) -> bool:
        """Whether a row names a file and does not hold its bytes."""
        batches = self.table.select_columns([self.image_column]).with_format("arrow").iter(1024)
        cells = (batch[self.image_column].combine_chunks() for batch in batches)
        return any(
            compute.any(compute.and_(c.field("bytes").is_null(), c.field("path").is_valid())).as_py() for c in cells
        )

    def class_names(self) -> list[str]:
        """Names of the classes in the order of their labels, or an empty list."""
        feature = self.table.features[self.label_column] if self.label_column else None
        return list(feature.names or []) if isinstance(feature, datasets.ClassLabel) else []

    def without_labels(self) -> "ImageSource":
        """The same images with every other column dropped, so that a label cannot reach pretraining."""
        table = self.table.select_columns([self.image_column])
        return replace(self, table=table, label_column=None, unlabelled="")

    def subset(self, indices: NDArray[np.int64]) -> "ImageSource":
        """The rows at ``indices``, in that order."""
        table = self.table.select(indices)
        return replace(self, table=table, plan=None)

    def draw(self, count: int, seed: int) -> NDArray[np.int64]:
        """Positions of at most so many images to look at, drawn by ``seed``; of a stream, of few row groups."""
        if isinstance(self.table, StreamedRows):
            return self.table.draw(count, seed)
        return np.random.default_rng(seed).permutation(len(self))[:count]


def open_source(config: DataConfig) -> ImageSource:
    """Find the images that a ``[data]`` table names.

    Raises:
        UserError: Nothing there, no such split, no image column.
    """
    for key, path in config.paths():
        check_path(path, key)
    datasets.disable_progress_bars()
    if config.mix:
        source = mix([_open(each) for each in config.mix], [each.weight for each in config.mix])
    else:
        patterns = parquet_to_stream(config) if config.streaming else None
        source = _open(config) if patterns is None else _open_stream(config, patterns)
    return replace(source, channels=config.channels, background=config.background)


def _open(config: SourceConfig) -> ImageSource:
    description = f"{describe(config)} [{config.split}]"
    found = find_data(config)
    if found.table.num_rows == 0:
        raise UserError(f"[data] path: {description} holds no images")
    columns = found.columns
    table = only_columns(found.table, columns.image, columns.label)
    _say(f"{description}: {_count(table.num_rows)}, {found.words}")
    for note in found.notes:
        _say(f"{description}: {note}")
    return ImageSource(
        table, columns.image, columns.label, description, found.root, found.within, unlabelled=columns.unlabelled
    )


def _count(images: int) -> str:
    return f"{images:,} image{'s' if images != 1 else ''}"


def _say(words: str) -> None:
    """What was found, for commands to print; see `sslkit.cli.data_summary`."""
    LOGGER.info("data: %s", printable(words))


def _open_stream(config: DataConfig, patterns: list[str]) -> ImageSource:
    description = f"{describe(config)} [{config.split}]"
    files = find_parquet(config, patterns)
    footers = read_footers(files)
    columns = choose_columns(features_of(files[0], footers[0]), config)
    rows = StreamedRows(files, footers, columns.image)
    if not rows.groups:
        raise UserError(f"[data] path: {description} holds no images")
    _say(f"{description}: {_count(rows.num_rows)}, read as a stream, {columns.words()}")
    plan = Lanes(rows.sizes, config.shuffle_buffer)
    return ImageSource(rows, columns.image, columns.label, description, plan=plan, unlabelled=columns.unlabelled)


def mix(sources: list[ImageSource], weights: list[float | None]) -> ImageSource:
    """Several sources, without labels, as one: one after the other, in the shares of their weights if there are any.

    Raises:
        UserError: The rows of a local table among them name files, and whose files they may name could not be told.
    """
    tables = []
    for source in sources:
        if source.within and source.holds_names_alone():
            raise UserError(
                f"[[data.mix]] path: rows of {source.description} name files instead of holding images; pack it first "
                "by sslkit prepare"
            )
        bare = source.without_labels()
        tables.append(
            bare.table if bare.image_column == "image" else bare.table.rename_column(bare.image_column, "image")
        )
    table = datasets.concatenate_datasets(tables)
    roots = [source.root for source in sources]
    root = os.path.commonpath(roots) if all(roots) else ""
    shares = [weight for weight in weights if weight is not None]
    sizes = tuple(len(source) for source in sources)
    mixture = Mixture(sizes, tuple(shares)) if shares else None
    counts = mixture.counts() if mixture else []
    if 0 in counts:
        never = sources[counts.index(0)].description
        raise UserError(f"[[data.mix]] weight: {never} gets no sample of an epoch of {sum(counts)}; give it more")
    said = [f" ({share:.3g} of an epoch)" for share in mixture.shares()] if mixture else [""] * len(sources)
    description = " + ".join(source.description + share for source, share in zip(sources, said, strict=True))
    return ImageSource(table, "image", None, description, "" if root == "/" else root, plan=mixture)
