"""Where images come from: a folder, parquet or arrow files, a Hub dataset id, or the bundled set.

`datasets` does the finding, typing and memory-mapping. Images stay encoded until a worker decodes them.
"""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import datasets
import numpy as np
from numpy.typing import NDArray
from pyarrow import compute
from pydantic import BaseModel, ConfigDict, Field

from sslkit.data.bundled import BUILTIN, load_bundled
from sslkit.data.decode import Pixels, Reduction, Size, UnreadableImage, decode_reduced, decode_rgb, read_file
from sslkit.data.folder import folders_in, has_metadata, list_images, printable, to_path, to_text
from sslkit.data.tables import label_word, map_arrow, only_columns
from sslkit.errors import UserError, near_miss
from sslkit.parts.hub import quick_hub, why_not

LOADERS = ("imagefolder", "parquet", "arrow")
SPLITS = ("train", "test", "val", "validation")


class DataConfig(BaseModel):
    """The ``[data]`` table of a recipe, in the words of ``datasets.load_dataset``.

    Attributes:
        path: A folder of images (with or without a folder per class), a parquet or arrow file or a folder of them,
            a Hub dataset id, ``"imagefolder"`` / ``"parquet"`` / ``"arrow"`` with ``data_dir`` or ``data_files``, or
            ``"builtin:fashion_mnist"``.
        name: The dataset's configuration. ``"full"`` asks for all 70 000 images of ``builtin:fashion_mnist``.
        data_dir: Folder for the loaders above.
        data_files: Files for the loaders above.
        split: Which split to read.
        image_column: Column of images; found by its type when not given.
        label_column: Column of class labels; found by its type when not given. Never read for pretraining.
        workers: Processes that decode and augment; ``"auto"`` is one a core, less one on CPU-only machines.
        worker_timeout: Seconds that a batch may take before its worker counts as stuck (0: for ever).
        max_bad_share: The run stops when more than this share of the images, rounded up to whole images, has proved
            unreadable. Until then another image takes the place of each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: str = Field(min_length=1)
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    worker_timeout: float = Field(default=300.0, ge=0.0)
    max_bad_share: float = Field(default=0.01, ge=0.0, le=1.0)


@dataclass(frozen=True)
class ImageSource:
    """A map-style collection of encoded images and, if any, their labels.

    Attributes:
        table: The `datasets` table; its image column is not decoded by `datasets`.
        image_column: Name of the image column.
        label_column: Name of the label column, or None.
        description: How to name the source in print and errors.
        root: The folder below which all images lie, as `to_text` writes it; empty where they are no files of a folder.
        within: The folder that a local table's images may lie in, where its rows name files; empty: anywhere.
    """

    table: datasets.Dataset
    image_column: str
    label_column: str | None
    description: str
    root: str = ""
    within: str = ""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def read(self, index: int) -> Pixels:
        """Decode image ``index`` to (H, W, 3) uint8 RGB.

        Raises:
            UnreadableImage: It cannot be.
        """
        name, encoded = self.encoded(index)
        return decode_rgb(encoded, name)

    def read_reduced(self, index: int, reduction: Reduction) -> tuple[Pixels, Size]:
        """Image ``index`` as `decode_reduced` gives it, and height and width of the whole image.

        Raises:
            UnreadableImage: It cannot be decoded.
        """
        name, encoded = self.encoded(index)
        return decode_reduced(encoded, name, reduction)

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
        path = to_path(cell["path"])
        if self.within and not path.resolve().is_relative_to(self.within):
            raise UnreadableImage(name, f"the row names a file outside of {self.within}, the folder of its table")
        try:
            return name, read_file(path)
        except OSError as error:
            raise UnreadableImage(name, error.strerror or str(error)) from error

    def name(self, index: int) -> str:
        """What to call image ``index`` in print, on one line."""
        cell = self.table[index][self.image_column] or {}
        return printable(cell.get("path") or f"image {index} of {self.description}")

    def labels(self) -> list[str]:
        """The class of every image by name (or number, as text, where classes have no names).

        Raises:
            UserError: The source has none, or a row's is of no class.
        """
        if self.label_column is None:
            raise UserError(
                f"{self.description} has no labels; evaluation needs a folder per class, or [data] label_column"
            )
        names = self.class_names()
        return [label_word(value, names, index) for index, value in enumerate(self.table[self.label_column])]

    def paths(self) -> list[str]:
        """The file every image came from, as `to_text` writes it; empty text where the data does not know."""
        batches = self.table.select_columns([self.image_column]).with_format("arrow").iter(1024)
        return [
            path or ""
            for batch in batches
            for path in batch[self.image_column].combine_chunks().field("path").to_pylist()
        ]

    def fingerprint(self) -> str:
        """SHA-256 of what the images are: their bytes, or the paths, sizes and times of their files."""
        digest = hashlib.sha256()
        for batch in self.table.select_columns([self.image_column]).with_format("arrow").iter(256):
            for cell in batch[self.image_column].to_pylist():
                if cell["bytes"] is not None:
                    digest.update(hashlib.sha256(cell["bytes"]).digest())
                else:
                    try:
                        status = os.stat(to_path(cell["path"]))
                    except OSError as error:
                        raise UnreadableImage(printable(cell["path"]), error.strerror or str(error)) from error
                    digest.update(f"{cell['path']}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return digest.hexdigest()

    def names_digest(self) -> str:
        """SHA-256 of how many images there are and what they are called, below the folder that holds them all.

        Nothing is opened: images without a name count by their size in bytes. About a second for a million.
        """
        column = self.table.select_columns([self.image_column]).with_format("arrow")
        root = self._common_folder()
        digest = hashlib.sha256(str(len(self)).encode())
        for batch in column.iter(4096):
            images = batch[self.image_column].combine_chunks()
            sizes = compute.binary_length(images.field("bytes")).to_pylist()
            paths = images.field("path").to_pylist()
            for path, size in zip(paths, sizes, strict=True):
                digest.update(f"{(path or '')[root:]}\0{size}\0".encode())
        return digest.hexdigest()

    def _common_folder(self) -> int:
        """Length of the folders that all paths begin with."""
        column = self.table.select_columns([self.image_column]).with_format("arrow")
        ends: list[str] = []
        for batch in column.iter(4096):
            bounds = compute.min_max(batch[self.image_column].combine_chunks().field("path")).as_py()
            ends = [end for end in (*ends, *bounds.values()) if end is not None]
            ends = [min(ends), max(ends)] if ends else []
        return os.path.commonprefix(ends).rfind("/") + 1  # noqa: RUF071 - cut at a slash

    def class_names(self) -> list[str]:
        """Names of the classes in the order of their labels, or an empty list."""
        feature = self.table.features[self.label_column] if self.label_column else None
        return list(feature.names) if isinstance(feature, datasets.ClassLabel) else []

    def without_labels(self) -> "ImageSource":
        """The same images with every other column dropped, so that a label cannot reach pretraining."""
        table = self.table.select_columns([self.image_column])
        return replace(self, table=table, label_column=None)

    def subset(self, indices: NDArray[np.int64]) -> "ImageSource":
        """The rows at ``indices``, in that order."""
        table = self.table.select(indices)
        return replace(self, table=table)


def open_source(config: DataConfig) -> ImageSource:
    """Find the images that a ``[data]`` table names.

    Raises:
        UserError: Nothing there, no such split, no image column.
    """
    datasets.disable_progress_bars()
    table = _load(config)
    description = f"{_what(config)} [{config.split}]"
    if table.num_rows == 0:
        raise UserError(f"[data] path: {description} holds no images")
    image_column, label_column = _image_column(table, config), _label_column(table, config)
    table = only_columns(table, image_column, label_column)
    root = _image_folder(config)
    below = to_text(str(root)) if root and not has_metadata(root) else ""
    return ImageSource(table, image_column, label_column, description, below, _folder_of_table(config))


def available_splits(config: DataConfig) -> list[str]:
    """Names of the splits that can be asked of this source; empty where only trying would tell."""
    if config.path.startswith(BUILTIN):
        return ["train", "test"]
    folder = Path(config.data_dir or config.path)
    if folder.is_dir():
        return [name for name in SPLITS if (folder / name).is_dir()] or ["train"]
    return []


def files_left_out(config: DataConfig) -> Counter[str]:
    """How many files of a folder were not taken for images, by suffix; empty for data of another kind."""
    root = _image_folder(config)
    return list_images(root).left_out if root and not has_metadata(root) else Counter()


def _load(config: DataConfig) -> datasets.Dataset:
    if config.path.startswith(BUILTIN):
        return load_bundled(config)
    if (root := _image_folder(config)) and not has_metadata(root):
        return list_images(root).table
    loader, files = _local_files(config)
    try:
        if loader is None:
            with quick_hub():
                return datasets.load_dataset(config.path, config.name, data_dir=config.data_dir, split=config.split)
        if loader == "arrow":
            return map_arrow(files)
        # Without a word, datasets drops the labels of a split that holds only one class.
        extra = {"drop_labels": not _has_class_folders(files)} if loader == "imagefolder" else {}
        return datasets.load_dataset(loader, data_files={"split": files}, split="split", **extra)
    except Exception as error:  # what a stranger's metadata makes of `datasets` is no closed set
        if isinstance(error, UserError):
            raise
        where = "" if loader else "no folder of that name here, and as a dataset of the Hub: "
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        reason += "" if loader else why_not()
        if "corresponds to no data" in reason:
            reason = "no images in it"
        raise UserError(f"[data] path: cannot load {_what(config)!r}: {where}{reason}") from error


def _image_folder(config: DataConfig) -> Path | None:
    """The folder below which every image is one of the split, or None where the data are of another kind."""
    if config.path == "imagefolder" and config.data_dir and not config.data_files:
        return _split_folder(Path(config.data_dir), config.split)
    path = Path(config.path).expanduser()
    if config.path not in LOADERS and path.is_dir() and _loader_for_folder(path) == "imagefolder":
        return _split_folder(path, config.split)
    return None


def _folder_of_table(config: DataConfig) -> str:
    """The folder of a local table, which its rows' files must lie in."""
    place = Path(config.data_dir or config.path).expanduser()
    if config.path.startswith(BUILTIN) or config.data_files or _image_folder(config) or not place.exists():
        return ""
    return str((place if place.is_dir() else place.parent).resolve())


def _what(config: DataConfig) -> str:
    """The words that tell a user which source is meant."""
    return str(config.data_dir or config.data_files) if config.path in LOADERS else config.path


def _local_files(config: DataConfig) -> tuple[str | None, list[str]]:
    """The `datasets` loader for local files and the patterns to give it; no loader means a Hub id."""
    if config.path in LOADERS:
        if config.data_files:
            files = [config.data_files] if isinstance(config.data_files, str) else config.data_files
            return config.path, files
        if not config.data_dir:
            raise UserError(f"[data] data_dir: path = {config.path!r} needs data_dir or data_files")
        return config.path, [_folder_pattern(Path(config.data_dir), config.split, config.path)]
    path = Path(config.path).expanduser()
    if path.is_dir():
        loader = _loader_for_folder(path)
        return loader, [_folder_pattern(path, config.split, loader)]
    if path.is_file():
        loaders = {".parquet": "parquet", ".arrow": "arrow"}
        if path.suffix not in loaders:
            raise UserError(f"[data] path: {config.path!r} is a file but neither .parquet nor .arrow")
        return loaders[path.suffix], [glob.escape(str(path))]
    if path.is_absolute() or config.path.count("/") != 1 or config.path.startswith((".", "~")):
        here = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"[data] path: no folder or file {config.path!r}{near_miss(path.name, here)}; a dataset of the Hub is "
            "written user/name"
        )
    return None, []


def _loader_for_folder(folder: Path) -> str:
    found = {name.rpartition(".")[2] for name in _names_near(folder) if name.endswith((".parquet", ".arrow"))}
    return next((loader for loader in ("parquet", "arrow") if loader in found), "imagefolder")


def _names_near(folder: Path) -> Iterator[str]:
    """Names in a folder and in those right below it."""
    places = [folder, *(folder / name for name in folders_in(folder))]
    for place in places:
        with suppress(OSError), os.scandir(place) as entries:
            yield from (entry.name for entry in entries)


def _folder_pattern(folder: Path, split: str, loader: str) -> str:
    pattern = glob.escape(str(_split_folder(folder, split)))
    return f"{pattern}/**" if loader == "imagefolder" else f"{pattern}/**/*.{loader}"


def _split_folder(folder: Path, split: str) -> Path:
    """The split's subfolder where all subfolders are splits, else the folder itself, as the split "train"."""
    if not folder.is_dir():
        raise UserError(f"[data] data_dir: no folder {str(folder)!r}")
    found = folders_in(folder)
    if set(found) & set(SPLITS) and not set(found) <= set(SPLITS):
        raise UserError(
            f"[data] path: {str(folder)!r} has folders of splits and others, {found[:8]}; name a folder that holds "
            f"either splits ({', '.join(SPLITS)}) or classes"
        )
    if split not in found and ((found and set(found) <= set(SPLITS)) or split != "train"):
        raise UserError(f"[data] split: {str(folder)!r} has no folder {split!r}; it has {found[:8]}")
    root = folder / split if split in found else folder
    if next((entry for entry in root.rglob("*") if not entry.is_dir()), None) is None:
        raise UserError(f"[data] path: the folder {str(root)!r} is empty")
    return root


def _has_class_folders(patterns: list[str]) -> bool:
    roots = [pattern.removesuffix("/**") for pattern in patterns if pattern.endswith("/**")]
    return any(Path(entry).is_dir() for root in roots for entry in glob.glob(f"{root}/*"))


def _image_column(table: datasets.Dataset, config: DataConfig) -> str:
    if config.image_column is not None:
        return _named_column(table, "image_column", config.image_column)
    typed = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    named = [name for name in ("image", "img", "jpg", "png") if name in table.column_names]
    if not typed and not named:
        raise UserError(f"[data] image_column: no column of images found among {table.column_names}; name it")
    return str((typed or named)[0])


def _label_column(table: datasets.Dataset, config: DataConfig) -> str | None:
    if config.label_column is not None:
        return _named_column(table, "label_column", config.label_column)
    typed = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    plain = [name for name, feature in table.features.items() if isinstance(feature, datasets.Value)]
    named = [name for name in ("label", "labels", "cls") if name in plain]
    return next(iter(typed + named), None)


def _named_column(table: datasets.Dataset, key: str, name: str) -> str:
    if name not in table.column_names:
        miss = near_miss(name, table.column_names)
        raise UserError(f"[data] {key}: no column {name!r}{miss}; there are {table.column_names}")
    return name
