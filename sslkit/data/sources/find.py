"""Load the rows of a source: of a folder, of parquet, arrow or tar files, of a Hub dataset or a bundled one."""

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
from sslkit.data.formats.folder_listing import display_path, table_of_folders, to_text, walk_folders
from sslkit.data.formats.hints import count_suffixes
from sslkit.data.formats.image_folders import find_images, image_splits, refuse_several_folders
from sslkit.data.formats.metadata_tables import metadata_files, table_by_metadata
from sslkit.data.formats.parquet_streams import match_files
from sslkit.data.formats.splits import ALL, choose, files_by_split, in_order, no_such_split, refuse_several
from sslkit.data.formats.tables import SAVED_STATE, load_parquet, map_arrow, saved_splits, without_caches
from sslkit.data.formats.tar_samples import index_shards
from sslkit.data.formats.tar_shards import find_shards
from sslkit.data.sources.bundled import BUILTIN_SPLITS, load_bundled
from sslkit.data.sources.dataset_layout import (
    BUNDLED,
    HUB,
    KINDS,
    LOADERS,
    TABLES,
    DatasetLayout,
    describe,
    detect_layout,
    names_near,
)
from sslkit.errors import UserError, first_line
from sslkit.hub.availability import quiet_hub, unavailable_reason

HUB_KEYS = {"name", "data_dir", "data_files"}


@dataclass(frozen=True)
class FoundData:
    """The rows of a source."""

    rows: datasets.Dataset  # all rows with all columns; images are not decoded
    columns: Columns  # those to use
    summary: str  # what was chosen, for messages
    root: str = ""  # the folder that contains all images, as `to_text` writes it; empty for other kinds of data
    within: str = ""  # for a local table: the folder that must contain the files that its rows name
    skipped: Counter[str] = field(default_factory=Counter)  # files of a folder that are not images, by suffix
    notes: Sequence[str] = ()  # sentences on what else is not read


def available_splits(config: SourceConfig) -> list[str]:
    """Names of the splits of a source: ``["train"]`` if a local source names none, empty if still unknown."""
    layout = detect_layout(config)
    if layout.loader == BUNDLED:
        return list(BUILTIN_SPLITS)
    if layout.folder is None:
        return []
    if layout.loader == "imagefolder":
        return image_splits(layout.folder) or ["train"]
    return in_order(filter(None, _by_split(layout.folder, layout.loader))) or ["train"]


def skipped_files(config: SourceConfig) -> Counter[str]:
    """Number of files of a folder that are not read as images, by suffix; empty for other kinds of data."""
    layout = detect_layout(config)
    if layout.loader != "imagefolder" or layout.folder is None:
        return Counter()
    return _read_folder(layout.folder, config).skipped


def find_data(config: SourceConfig) -> FoundData:
    """Load the rows that ``config`` names. If there are none or they cannot be loaded, raise `UserError`."""
    layout = detect_layout(config)
    if layout.loader == "imagefolder" and layout.folder is not None:
        return _read_folder(layout.folder, config)
    if layout.loader == "webdataset":
        files = _files(layout, config.split)
        return FoundData(*index_shards(files, config.image_column, config.label_column, config.split))
    rows = _load(layout, config)
    columns = choose_columns(rows.features, config, _images_beside(config, layout))
    within = ""
    if layout.loader in TABLES and not config.data_files:
        within = str((layout.folder or Path(config.path).expanduser().parent).resolve())
    return FoundData(rows, columns, columns.summary(), within=within)


def files_to_stream(config: SourceConfig) -> list[str] | None:
    """Paths or addresses of a source's parquet files, in order; None if the source has files of another kind."""
    layout = detect_layout(config)
    if layout.loader == HUB:
        return _hub_files(config)
    if layout.loader != "parquet":
        return None
    if layout.folder is not None:
        return list(map(str, _files(layout, config.split)))
    return _matching(layout.patterns, config.split)


def _read_folder(folder: Path, config: SourceConfig) -> FoundData:
    """Image files, with the columns of a metadata table, or else with their folders as classes."""
    images = find_images(folder, config.split)
    tars, count = images.skipped[".tar"], sum(len(each.images) for each in images.folders)
    if config.split != ALL and tars > count:  # it is unclear which are meant
        raise UserError(
            f"[data] path: {display_path(folder)} holds {tars:,} tar files beside {count:,} images; move "
            'the images elsewhere to read the tar files, or give split = "all" to read only the images'
        )
    files = metadata_files(images)
    rows = table_by_metadata(images, files) if files else table_of_folders(images.folders, images.classes)
    columns = choose_columns(rows.features, config)
    skipped = images.skipped - Counter(file.suffix for file in files)
    if files:
        return FoundData(rows, columns, columns.summary(), skipped=skipped, notes=images.notes)
    others = f" (other files, not read: {count_suffixes(skipped)})" if skipped else ""
    labels = f"{len(set(images.classes))} folders as classes" if images.classes else "no labels"
    summary = f"image files{others}, {labels}"
    return FoundData(rows, columns, summary, to_text(str(images.root)), skipped=skipped, notes=images.notes)


def _load(layout: DatasetLayout, config: SourceConfig) -> datasets.Dataset:
    """Load the rows of a table."""
    if layout.loader == BUNDLED:
        return load_bundled(config)
    try:
        if layout.loader == HUB:
            return _load_from_hub(config)
        if layout.loader == "parquet":
            return load_parquet(_patterns(layout, config.split))
        if layout.loader == "arrow":
            if layout.folder is None:
                return map_arrow(sorted(_matching(layout.patterns, config.split)))
            files = list(map(str, _files(layout, config.split)))
            return map_arrow(sorted(files) if saved_splits(layout.folder) is None else files)
        patterns = list(layout.patterns)
        if local := [pattern for pattern in patterns if "://" not in pattern]:
            refuse_several_folders(_matching(local, ALL), config.split)
        # By default, `datasets` drops the labels of a split that holds only one class. "/**/" matches folders.
        drop = not any(glob.glob(f"{pattern}/") for pattern in patterns if pattern.endswith("/**"))
        return datasets.load_dataset("imagefolder", data_files={"split": patterns}, split="split", drop_labels=drop)
    except UserError:
        raise
    except Exception as error:  # untrusted metadata can make `datasets` raise anything
        if layout.loader == HUB:
            raise _hub_error(config, error) from error
        reason = "no images in it" if "corresponds to no data" in str(error) else first_line(error)
        raise UserError(
            f"[data] path: cannot load {describe(config)!r}: {reason}{_images_beside(config, layout)}"
        ) from error


def _load_from_hub(config: SourceConfig) -> datasets.Dataset:
    keys: dict[str, Any] = config.model_dump(include=HUB_KEYS)
    with quiet_hub():
        try:
            return datasets.load_dataset(config.path, split=config.split, **keys)
        except ValueError as error:
            if "nknown split" not in str(error):
                raise
            builder = datasets.load_dataset_builder(config.path, **keys)
            available = [str(name) for name in builder.info.splits or builder.config.data_files or {}]
            if len(found := choose(available, config.split)) != 1:
                raise no_such_split(config.path, "the splits", available, config.split) from error
            return datasets.load_dataset(config.path, split=found[0], **keys)


def _hub_files(config: SourceConfig) -> list[str]:
    """Addresses of the parquet files of a split of a Hub dataset."""
    try:
        with quiet_hub():
            builder = datasets.load_dataset_builder(config.path, **config.model_dump(include=HUB_KEYS))
        files = builder.config.data_files or {}
    except Exception as error:  # an untrusted repository can make `datasets` raise anything
        raise _hub_error(config, error) from error
    if builder.name != "parquet":
        raise UserError(
            f"[data] streaming: {config.path!r} does not consist of parquet files; leave streaming out to download it"
        )
    available = {str(name): [str(file) for file in each] for name, each in files.items()}
    names = list(available) if config.split == ALL else choose(available, config.split)
    if not names:
        raise no_such_split(config.path, "the splits", available, config.split)
    return [file for name in names for file in available[name]]


def _hub_error(config: SourceConfig, error: Exception) -> UserError:
    return UserError(
        f"[data] path: cannot load {config.path!r}: no folder of that name here, and as a dataset of the Hub: "
        f"{first_line(error)}{unavailable_reason()}"
    )


def _matching(patterns: Sequence[str], split: str) -> list[str]:
    """The files that patterns match. If there are none, or they are of several splits, raise `UserError`."""
    found = [file for pattern in patterns for file in match_files(pattern)]
    if not found:
        raise UserError(f"[data] data_files: no file matches {', '.join(patterns)}")
    refuse_several(found, patterns, split)
    return found


def _patterns(layout: DatasetLayout, split: str) -> list[str]:
    """Patterns of the tables of a split, or the given patterns."""
    if layout.folder is not None:
        return [glob.escape(str(file)) for file in _files(layout, split)]
    if local := [pattern for pattern in layout.patterns if "://" not in pattern]:
        _matching(local, split)
    return list(layout.patterns)


def _files(layout: DatasetLayout, split: str) -> list[Path]:
    """The tables or tar files of a split, or the tar files that match the given patterns."""
    if layout.folder is None:
        found = find_shards(list(layout.patterns))
        refuse_several(list(map(str, found)), layout.patterns, split)
        return found
    what = "tar" if layout.loader == "webdataset" else layout.loader
    by_split = _by_split(layout.folder, layout.loader, split)
    files = [file for each in by_split.values() for file in each]
    if not files:
        raise UserError(f"[data] path: {str(layout.folder)!r} holds no {what} files")
    if split == ALL:
        return files
    if "" in by_split:
        if not choose(["train"], split):
            raise UserError(
                f"[data] split: {str(layout.folder)!r} has {what} files, none of them named like a split, so there is "
                f"no {split!r}; leave split out to read them all"
            )
        return files
    names = choose(in_order(by_split), split)
    if not names:
        raise no_such_split(str(layout.folder), f"{what} files", by_split, split)
    chosen = [file for name in names for file in by_split[name]]
    if choose(["train"], split):
        _refuse_links(chosen, [file for name in by_split if name not in names for file in by_split[name]])
    return chosen


def _refuse_links(chosen: Sequence[Path], others: Sequence[Path]) -> None:
    """Refuse files of the training split that are links to files of another split."""
    real = {os.path.realpath(file): file for file in others if not file.is_symlink()}
    for file in chosen:
        if other := real.get(os.path.realpath(file)):
            raise UserError(
                f"[data] path: {str(file)!r} is a link to {str(other)!r}, which is of another split; remove the link, "
                "so that no held-out image is trained on"
            )


def _by_split(folder: Path, loader: str, split: str = "") -> dict[str, list[Path]]:
    """The tables or tar files of a folder by split; under an empty name if there are no splits, or for `ALL`."""
    if loader == "arrow" and (saved := saved_splits(folder)) is not None:
        return saved
    files: list[Path] = []
    for path, names, _ in walk_folders(str(folder)):
        if loader == "arrow" and SAVED_STATE in names:
            files += (saved_splits(Path(path)) or {}).get("", [])
        else:
            found = [Path(path, name) for name in names if KINDS[loader](name)]
            files += without_caches(found) if loader == "arrow" else found
    files.sort()
    return (files_by_split(files, folder) if files and split != ALL else {}) or {"": files}


def _images_beside(config: SourceConfig, layout: DatasetLayout) -> str:
    """A hint for the case that a table among image files was taken for the data."""
    folder = layout.folder
    if config.path in LOADERS or folder is None or not any(map(KINDS["imagefolder"], names_near(folder))):
        return ""
    return f', or, for the image files beside it, write path = "imagefolder" and data_dir = "{folder}"'
