"""The rows of a source, wherever it lies: a folder, parquet, arrow or tar files, a Hub dataset, or the bundled set."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from sslkit.data.config import SourceConfig
from sslkit.data.formats.columns import Columns, choose_columns
from sslkit.data.formats.folder_listing import to_text, walk_folders
from sslkit.data.formats.hints import count_suffixes
from sslkit.data.formats.image_folders import ImageFiles, find_images, image_splits, refuse_several_folders
from sslkit.data.formats.metadata_tables import metadata_files, table_by_metadata
from sslkit.data.formats.saved_datasets import STATE, saved_splits, without_caches
from sslkit.data.formats.splits import ALL, choose, files_by_split, in_order, no_such_split, refuse_several
from sslkit.data.formats.tables import load_parquet, map_arrow
from sslkit.data.formats.tar_samples import index_shards
from sslkit.data.formats.tar_shards import find_shards
from sslkit.data.sources.bundled import load_bundled
from sslkit.data.sources.location import BUNDLED, HUB, KINDS, LOADERS, Place, describe, names_near, place_of
from sslkit.errors import UserError
from sslkit.hub.availability import quiet_hub, unavailable_reason


@dataclass(frozen=True)
class Found:
    """The rows of a source.

    Attributes:
        table: With all their columns; images are not decoded.
        columns: Which of them are used.
        words: What was chosen, for print.
        root: The folder below which all images lie, as `to_text` writes it; empty where they are no files of a folder.
        within: The folder that a local table's images may lie in, where its rows name files; empty: anywhere.
        left_out: How many files of a folder were not taken for images, by suffix.
        notes: Sentences on what else is not read.
    """

    table: datasets.Dataset
    columns: Columns
    words: str
    root: str = ""
    within: str = ""
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Sequence[str] = ()


def available_splits(config: SourceConfig) -> list[str]:
    """Names of the splits that can be asked of this source; empty where only trying would tell."""
    place = place_of(config)
    if place.loader == BUNDLED:
        return ["train", "test"]
    if place.folder is None:
        return []
    if place.loader == "imagefolder":
        return image_splits(place.folder) or ["train"]
    return in_order(_by_split(place.folder, place.loader)[0]) or ["train"]


def files_left_out(config: SourceConfig) -> Counter[str]:
    """How many files of a folder are not read as images, by suffix; empty for data of another kind."""
    place = place_of(config)
    if place.loader != "imagefolder" or place.folder is None:
        return Counter()
    return _read_folder(place.folder, config).left_out


def find_data(config: SourceConfig) -> Found:
    """The rows that ``config`` names.

    Raises:
        UserError: There are none, or they cannot be loaded.
    """
    place = place_of(config)
    if place.loader == "imagefolder" and place.folder is not None:
        return _read_folder(place.folder, config)
    if place.loader == "webdataset":
        indexed = index_shards(_files(place, config.split), config.image_column, config.label_column, config.split)
        columns = Columns("image", indexed.label, unlabelled=indexed.unlabelled)
        return Found(indexed.table, columns, indexed.words)
    table = _load(place, config)
    columns = choose_columns(table.features, config, _images_beside(config, place))
    return Found(table, columns, columns.words(), within=_folder_of_table(place, config))


def parquet_to_stream(config: SourceConfig) -> list[str] | None:
    """Patterns of the parquet files that a source would be made of, none for a dataset of the Hub; None: other files.

    Raises:
        UserError: There is nothing of that name.
    """
    place = place_of(config)
    if place.loader == HUB:
        return []
    return _patterns(place, config.split) if place.loader == "parquet" else None


def _read_folder(folder: Path, config: SourceConfig) -> Found:
    """Image files, with what a table beside them says of them or else with their folders as classes."""
    images = find_images(folder, config.split)
    files = metadata_files(images)
    if files:
        table = table_by_metadata(images, files)
        columns = choose_columns(table.features, config)
        others = images.left_out - Counter(file.suffix for file in files)
        return Found(table, columns, columns.words(), left_out=others, notes=images.notes)
    table = images.table()
    columns = choose_columns(table.features, config)
    root = to_text(str(images.root))
    return Found(table, columns, _words(images), root, left_out=images.left_out, notes=images.notes)


def _words(images: ImageFiles) -> str:
    left = f" (other files, left out: {count_suffixes(images.left_out)})" if images.left_out else ""
    return f"image files{left}, " + (
        f"{len(set(images.classes))} folders as classes" if images.classes else "no labels"
    )


def _load(place: Place, config: SourceConfig) -> datasets.Dataset:
    """The rows of a table."""
    if place.loader == BUNDLED:
        return load_bundled(config)
    try:
        if place.loader == HUB:
            return _load_from_hub(config)
        if place.loader == "arrow":
            saved = place.folder is not None and saved_splits(place.folder) is not None
            in_order = list(map(str, _files(place, config.split))) if saved else None
            return map_arrow([] if saved else _patterns(place, config.split), in_order)
        if place.loader == "parquet":
            return load_parquet(_patterns(place, config.split))
        files = list(place.patterns)
        named = [name for each in files for name in glob.glob(each, recursive=True)]
        if not named and not any("://" in each for each in files):
            raise UserError(f"[data] data_files: no file is named by {', '.join(files)}")
        refuse_several_folders(named, config.split)
        # Without a word, datasets drops the labels of a split that holds only one class.
        drop = not _has_class_folders(files)
        return datasets.load_dataset("imagefolder", data_files={"split": files}, split="split", drop_labels=drop)
    except Exception as error:  # what a stranger's metadata makes of `datasets` is no closed set
        if isinstance(error, UserError):
            raise
        where = "no folder of that name here, and as a dataset of the Hub: " if place.loader == HUB else ""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        reason += unavailable_reason() if place.loader == HUB else ""
        if "corresponds to no data" in reason:
            reason = "no images in it"
        reason += _images_beside(config, place)
        raise UserError(f"[data] path: cannot load {describe(config)!r}: {where}{reason}") from error


def _load_from_hub(config: SourceConfig) -> datasets.Dataset:
    words: dict[str, Any] = {"name": config.name, "data_dir": config.data_dir, "data_files": config.data_files}
    with quiet_hub():
        try:
            return datasets.load_dataset(config.path, split=config.split, **words)
        except ValueError as error:
            if "nknown split" not in str(error):
                raise
            builder = datasets.load_dataset_builder(config.path, **words)
            there = [str(name) for name in builder.info.splits or builder.config.data_files or {}]
            if len(found := choose(there, config.split)) != 1:
                raise no_such_split(config.path, "the splits", there, config.split) from error
            return datasets.load_dataset(config.path, split=found[0], **words)


def _patterns(place: Place, split: str) -> list[str]:
    """The files of a split of tables as patterns, or the patterns that were given."""
    if place.folder is not None:
        return [glob.escape(str(file)) for file in _files(place, split)]
    local = [pattern for pattern in place.patterns if "://" not in pattern]
    found = [file for pattern in local for file in glob.glob(pattern, recursive=True)]
    if not found and len(local) == len(place.patterns):
        raise UserError(f"[data] data_files: no file is named by {', '.join(local)}")
    refuse_several(found, local, split)
    return list(place.patterns)


def _files(place: Place, split: str) -> list[Path]:
    """The tables or tar files of a split, or those that were named by patterns."""
    what = "tar" if place.loader == "webdataset" else place.loader
    if place.folder is None:
        found = find_shards(list(place.patterns))
        refuse_several(list(map(str, found)), place.patterns, split)
        return found
    by_split, files = ({}, _files_below(place.folder, place.loader)) if split == ALL else _by_split(
        place.folder, place.loader
    )  # fmt: skip
    if not files:
        raise UserError(f"[data] path: {str(place.folder)!r} holds no {what} files")
    if not by_split:
        if split != ALL and not choose(["train"], split):
            raise UserError(
                f"[data] split: {str(place.folder)!r} has {what} files, none of them named like a split, so no "
                f"{split!r}; leave split out to read them all"
            )
        return files
    words = choose(in_order(by_split), split)
    if not words:
        raise no_such_split(str(place.folder), f"{what} files", by_split, split)
    chosen = [file for word in words for file in by_split[word]]
    if choose(["train"], split):
        _refuse_links(chosen, [file for word in by_split if word not in words for file in by_split[word]])
    return chosen


def _refuse_links(chosen: Sequence[Path], others: Sequence[Path]) -> None:
    """Refuse files of the training split that are links to those of another."""
    real = {os.path.realpath(file): file for file in others if not file.is_symlink()}
    for file in chosen:
        if other := real.get(os.path.realpath(file)):
            raise UserError(
                f"[data] path: {str(file)!r} is a link to {str(other)!r}, which is of another split; remove the link, "
                "so that no held-out image is trained on"
            )


def _by_split(folder: Path, loader: str) -> tuple[dict[str, list[Path]], list[Path]]:
    """The tables or tar files of a folder by their split words, if any, and all of them."""
    saved = saved_splits(folder) if loader == "arrow" else None
    if saved is not None:
        files = [file for each in saved.values() for file in each]
        return ({} if "" in saved else saved), files
    files = _files_below(folder, loader)
    return (files_by_split(files, folder) if files else {}), files


def _files_below(folder: Path, loader: str) -> list[Path]:
    if loader == "arrow" and (saved := saved_splits(folder)) is not None:
        return [file for each in saved.values() for file in each]
    files: list[Path] = []
    for visited in walk_folders(str(folder)):
        here = Path(visited.path)
        if loader == "arrow" and STATE in visited.names:
            files += (saved_splits(here) or {}).get("", [])
        else:
            found = [here / name for name in visited.names if KINDS[loader](name)]
            files += without_caches(found) if loader == "arrow" else found
    return sorted(files)


def _folder_of_table(place: Place, config: SourceConfig) -> str:
    """The folder of a local table, which its rows' files must lie in."""
    if place.loader not in ("parquet", "arrow") or config.data_files:
        return ""
    return str((place.folder or Path(config.path).expanduser().parent).resolve())


def _images_beside(config: SourceConfig, place: Place) -> str:
    """What to do where a table among image files was taken for the data."""
    folder = place.folder
    if config.path in LOADERS or folder is None or not any(map(KINDS["imagefolder"], names_near(folder))):
        return ""
    return f', or, for the image files beside it, write path = "imagefolder" and data_dir = "{folder}"'


def _has_class_folders(patterns: list[str]) -> bool:
    roots = [pattern.removesuffix("/**") for pattern in patterns if pattern.endswith("/**")]
    return any(Path(entry).is_dir() for root in roots for entry in glob.glob(f"{root}/*"))
