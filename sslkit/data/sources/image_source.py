"""The images of a run or an evaluation: one source, or several mixed. They stay encoded until a worker decodes them."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import compute

from sslkit.data.config import DataConfig, SourceConfig
from sslkit.data.decode.background import WHITE
from sslkit.data.decode.channels import decode_channels
from sslkit.data.decode.rgb import Pixels, Reduction, Size, UnreadableImage, decode_reduced, decode_rgb, read_file
from sslkit.data.formats.columns import choose_columns
from sslkit.data.formats.folder_listing import printable, span_of, to_path
from sslkit.data.formats.parquet_streams import StreamedTable, features_of, read_footers
from sslkit.data.formats.tables import is_missing, label_text, only_columns
from sslkit.data.order.epoch_order import OrderPlan
from sslkit.data.order.mixture import Mixture
from sslkit.data.order.stream_order import StreamOrder
from sslkit.data.sources.dataset_layout import describe
from sslkit.data.sources.find import available_splits, files_to_stream, find_data, skipped_files
from sslkit.data.sources.image_table import ImageTable, MappedTable
from sslkit.errors import UserError, check_path

LOGGER = logging.getLogger("sslkit.data")
__all__ = ["DataConfig", "ImageSource", "available_splits", "open_source", "skipped_files"]


@dataclass(frozen=True)
class ImageSource:
    """A map-style collection of encoded images and, if any, their labels.

    Attributes:
        description: Name of the source in messages.
        root: The folder that contains all images, as `to_text` writes it; empty if they are not files of a folder.
        within: For a local table whose rows name files: the folder that must contain them; empty for no restriction.
        plan: The order of an epoch of a mixture or a stream; None for a shuffle of all images.
        channels: None for 8-bit RGB, else the number of 16-bit channels that images are decoded to.
        unlabelled: Why there are no usable labels; empty if nothing is wrong with them.
        background: What transparent pixels of RGB are composited over; see `DataConfig`.
    """

    table: ImageTable
    description: str
    root: str = ""
    within: str = ""
    plan: OrderPlan | None = None
    channels: int | None = None
    unlabelled: str = ""
    background: str = WHITE

    def __len__(self) -> int:
        return len(self.table)

    @property
    def label_column(self) -> str | None:
        """Name of the label column, or None."""
        return self.table.label_column

    def read(self, index: int) -> Pixels:
        """Decode image ``index`` to (H, W, 3) uint8 RGB, or to (H, W, channels) uint16.

        Raises:
            UnreadableImage: It cannot be read or decoded.
        """
        name, encoded = self.encoded(index)
        if self.channels is None:
            return decode_rgb(encoded, name, self.background)
        return decode_channels(encoded, name, self.channels)

    def decode(self, name: str, encoded: bytes, reduction: Reduction) -> tuple[Pixels, Size]:
        """Decode the result of `encoded` like `decode_reduced`; images of other channels than RGB are not reduced."""
        if self.channels is None:
            return decode_reduced(encoded, name, reduction, self.background)
        pixels = decode_channels(encoded, name, self.channels)
        return pixels, pixels.shape[:2]

    def encoded(self, index: int) -> tuple[str, bytes]:
        """The printable name of image ``index``, and its encoded bytes.

        Raises:
            UnreadableImage: There are none, or they cannot be read.
        """
        cell = self.table.cell(index)
        name = printable(cell.get("path") or self._number(index))
        encoded = cell.get("bytes")
        if encoded is not None:
            return name, encoded
        if not cell.get("path"):
            raise UnreadableImage(name, "the row holds no image")
        path = Path(self.within, to_path(cell["path"]))  # relative to the table's folder
        if self.within and not path.resolve().is_relative_to(self.within):
            raise UnreadableImage(name, f"the row names a file outside of {self.within}, the folder of its table")
        try:
            return name, read_file(path, span_of(cell["path"]))
        except OSError as error:
            raise UnreadableImage(name, error.strerror or str(error)) from error

    def name(self, index: int) -> str:
        """Printable name of image ``index``, on one line."""
        return self.table.name(index) or printable(self._number(index))

    def _number(self, index: int) -> str:
        return f"image {index} of {self.description}"

    def labels(self) -> list[str]:
        """The class name of every image, or the class number as text if classes have no names.

        Raises:
            UserError: The source has no labels, or an image has none or one of no class.
        """
        if self.label_column is None or self.unlabelled:
            why = self.unlabelled and f": {self.unlabelled}"
            raise UserError(
                f"{self.description} has no labels; evaluation needs a folder per class, a metadata.csv with "
                f"file_name and label beside the images, or [data] label_column (--label-column){why}"
            )
        names, values = self.class_names(), self.table.labels()
        if missing := [row for row, value in enumerate(values) if is_missing(value)]:
            raise UserError(
                f"[data] label_column: {len(missing):,} of {len(values):,} images of {self.description} have no label; "
                f"row {missing[0]} has the label {values[missing[0]]!r}, which is of no class; leave unlabelled rows "
                f"out ({self.name(missing[0])})"
            )
        labels = []
        for index, value in enumerate(values):
            try:
                labels.append(label_text(value, names))
            except ValueError as error:
                raise UserError(
                    f"[data] label_column: row {index} has the label {value!r:.50}, {error} ({self.name(index)})"
                ) from error
        return labels

    def class_names(self) -> list[str]:
        """Names of the classes in the order of their labels; empty if they have none."""
        feature = self.table.label_feature
        return list(feature.names or []) if isinstance(feature, datasets.ClassLabel) else []

    def paths(self) -> list[str]:
        """The file of every image, as `to_text` writes it; empty where it is unknown."""
        return self.table.paths()

    def without_labels(self) -> "ImageSource":
        """The same images without all other columns, so that labels cannot reach pretraining."""
        return replace(self, table=self.table.without_labels(), unlabelled="")

    def subset(self, indices: NDArray[np.int64]) -> "ImageSource":
        """The images at ``indices``, in this order."""
        return replace(self, table=self.table.select(indices), plan=None)

    def holding(self, groups: int) -> "ImageSource":
        """The same images; up to ``groups`` row groups of a stream are kept in memory."""
        return replace(self, table=self.table.holding(groups))

    def sample(self, count: int, seed: int) -> NDArray[np.int64]:
        """Indices of at most ``count`` random images; those of a stream are in few row groups."""
        return self.table.sample(count, seed)

    def describe_streaming(self, batch_size: int, num_processes: int, num_workers: int) -> str:
        """A sentence on the memory that each worker needs for a stream; empty if the source is no stream."""
        groups = self.plan.groups_held(batch_size, num_processes, num_workers) if self.plan else 0
        return self.table.describe_streaming(groups)


def open_source(config: DataConfig) -> ImageSource:
    """Open the images that a ``[data]`` table names.

    Raises:
        UserError: They do not exist or cannot be loaded, or there is no such split or no image column.
    """
    for key, path in config.paths():
        check_path(path, key)
    datasets.disable_progress_bars()
    if config.mix:
        source = mix([_open(each) for each in config.mix], [each.weight for each in config.mix])
    else:
        streamed = files_to_stream(config) if config.streaming else None
        source = _open(config) if streamed is None else _open_stream(config, streamed)
    return replace(source, channels=config.channels, background=config.background)


def _open(config: SourceConfig) -> ImageSource:
    description = f"{describe(config)} [{config.split}]"
    found = find_data(config)
    if found.rows.num_rows == 0:
        raise UserError(f"[data] path: {description} holds no images")
    columns = found.columns
    table = MappedTable(only_columns(found.rows, columns.image, columns.label), columns.image, columns.label)
    _log(f"{description}: {_count(len(table))}, {found.summary}")
    for note in found.notes:
        _log(f"{description}: {note}")
    return ImageSource(table, description, found.root, found.within, unlabelled=columns.unlabelled)


def _open_stream(config: DataConfig, files: list[str]) -> ImageSource:
    description = f"{describe(config)} [{config.split}]"
    footers = read_footers(files)
    columns = choose_columns(features_of(files[0], footers[0]), config)
    table = StreamedTable(files, footers, columns.image, columns.label)
    if not table.groups:
        raise UserError(f"[data] path: {description} holds no images")
    _log(f"{description}: {_count(len(table))}, read as a stream, {columns.summary()}")
    plan = StreamOrder(table.sizes, config.shuffle_buffer)
    return ImageSource(table, description, plan=plan, unlabelled=columns.unlabelled)


def _count(images: int) -> str:
    return f"{images:,} image{'s' if images != 1 else ''}"


def _log(message: str) -> None:
    """Log what was found; commands print it, see `sslkit.cli.output`."""
    LOGGER.info("data: %s", printable(message))


def mix(sources: list[ImageSource], weights: list[float | None]) -> ImageSource:
    """Concatenate sources, without labels; an epoch takes samples from them in proportion to the weights, if given.

    Raises:
        UserError: A local table among them names files, which must lie in its own folder, or a source's weight is so
            small that an epoch has no sample of it.
    """
    for source in sources:
        if source.within and any(_names_files(cells) for cells in source.table.cells(1024)):
            raise UserError(
                f"[[data.mix]] path: rows of {source.description} name files instead of holding images; pack it first "
                "by sslkit prepare"
            )
    table = MappedTable(datasets.concatenate_datasets([source.table.as_dataset() for source in sources]))
    roots = [source.root for source in sources]
    root = os.path.commonpath(roots) if all(roots) else ""
    given = [weight for weight in weights if weight is not None]
    mixture = Mixture(tuple(map(len, sources)), tuple(given)) if given else None
    counts = mixture.counts() if mixture else []
    if 0 in counts:
        unused = sources[counts.index(0)].description
        raise UserError(f"[[data.mix]] weight: {unused} gets no sample of an epoch of {sum(counts)}; increase it")
    shares = [f" ({share:.3g} of an epoch)" for share in mixture.shares()] if mixture else [""] * len(sources)
    description = " + ".join(source.description + share for source, share in zip(sources, shares, strict=True))
    return ImageSource(table, description, "" if root == "/" else root, plan=mixture)


def _names_files(cells: pa.StructArray) -> bool:
    """Whether a row names a file and does not hold its bytes."""
    return bool(compute.any(compute.and_(cells.field("bytes").is_null(), cells.field("path").is_valid())).as_py())
