"""What the keys of ``[data]`` name: files of which kind, in a folder or by patterns, or a dataset of the Hub."""

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from sslkit.data.config import SourceConfig
from sslkit.data.formats.folder_listing import METADATA, folders_in, is_image, walk_folders
from sslkit.data.formats.tables import SAVED_SPLITS, SAVED_STATE
from sslkit.data.formats.tar_shards import is_shard
from sslkit.data.sources.bundled import BUILTIN
from sslkit.errors import UserError, near_miss

LOADERS = ("imagefolder", "parquet", "arrow", "webdataset")
TABLES = ("parquet", "arrow")
HUB, BUNDLED = "hub", "builtin"


@dataclass(frozen=True)
class DatasetLayout:
    """Where the images are, and what kind of files they are stored in."""

    loader: str  # one of `LOADERS`, or `HUB` or `BUNDLED`
    folder: Path | None = None  # contains all files of this kind, of which a split is chosen by name
    patterns: tuple[str, ...] = ()  # without a folder: paths or patterns of the files


def detect_layout(config: SourceConfig) -> DatasetLayout:
    """Find out what a source names. A source that does not exist, or a key that does not apply, raises `UserError`."""
    if config.path.startswith(BUILTIN):
        _refuse(config, ("data_files",), "a bundled data set")
        if config.data_dir is not None and config.name != "full":
            raise UserError(
                f"[data] data_dir: applies to {config.path} only with [data] name = 'full', which reads all images "
                "from files there; set it, or leave data_dir out"
            )
        return DatasetLayout(BUNDLED)
    if config.path in LOADERS:
        return _by_loader(config)
    path = Path(config.path).expanduser()
    if os.path.isdir(path):
        return _in_folder(config, path)
    if os.path.isfile(path) or (is_shard(config.path) and any(char in config.path for char in "*?[{")):
        _refuse(config, ("name", "data_dir", "data_files"), "a file")
        loader = next((kind for kind in ("webdataset", *TABLES) if KINDS[kind](path.name)), "")
        if not loader:
            raise UserError(
                f"[data] path: {config.path!r} is a file, but not a .parquet, .arrow or .tar file; for image files, "
                "give their folder"
            )
        return DatasetLayout(loader, patterns=(config.path if loader == "webdataset" else glob.escape(str(path)),))
    if path.is_absolute() or config.path.count("/") != 1 or config.path.startswith((".", "~")):
        siblings = [entry.name for entry in path.parent.iterdir()] if os.path.isdir(path.parent) else []
        raise UserError(
            f"[data] path: no folder or file {config.path!r}{near_miss(path.name, siblings)}; a dataset of the Hub is "
            "written user/name"
        )
    return DatasetLayout(HUB)


def describe(config: SourceConfig) -> str:
    """Name of a source in messages."""
    if config.path in LOADERS:
        return str(config.data_dir or config.data_files)
    return f"{config.path}/{config.data_dir}" if config.data_dir and os.path.isdir(config.path) else config.path


def _by_loader(config: SourceConfig) -> DatasetLayout:
    _refuse(config, ("name",), "local files")
    if config.data_files:
        files = [config.data_files] if isinstance(config.data_files, str) else config.data_files
        if config.data_dir:
            files = [file if "://" in file else os.path.join(config.data_dir, file) for file in files]
        return DatasetLayout(config.path, patterns=tuple(files))
    if not config.data_dir:
        raise UserError(f"[data] data_dir: path = {config.path!r} needs data_dir or data_files")
    folder = Path(config.data_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"[data] data_dir: {str(folder)!r} is not a folder")
    return DatasetLayout(config.path, folder)


def _in_folder(config: SourceConfig, path: Path) -> DatasetLayout:
    """A folder, or its subfolder ``data_dir``."""
    if config.data_files is not None:
        kind = kind_of_folder(path)
        files = [config.data_files] if isinstance(config.data_files, str) else config.data_files
        raise UserError(
            f'[data] data_files: goes with path = "{kind}", not with a folder; write path = "{kind}" and '
            f"data_files = {[os.path.join(config.path, file) for file in files]}, or leave data_files out"
        )
    _refuse(config, ("name",), "a folder")
    if config.data_dir is not None:
        inner = path / config.data_dir
        if not inner.is_dir():
            raise UserError(
                f"[data] data_dir: no folder {config.data_dir!r} in {str(path)!r}"
                f"{near_miss(config.data_dir, folders_in(path))}; there are {folders_in(path)[:8]}"
            )
        path = inner
    return DatasetLayout(kind_of_folder(path), path)


def _refuse(config: SourceConfig, keys: Iterable[str], what: str) -> None:
    for key in keys:
        if (value := getattr(config, key)) is not None:
            option = " (--name or --data-name)" if key == "name" else ""
            meaning = "selects a configuration of a Hub dataset" if key == "name" else "goes with a folder or a loader"
            raise UserError(
                f"[data] {key}: {value!r} {meaning}, but {config.path!r} is {what}, which has none; leave {key} out"
                f"{option}"
            )


def _is_table(kind: str, name: str) -> bool:
    """Whether a file name is that of a table of this kind, and not that of a metadata table about image files."""
    return name.lower().endswith(f".{kind}") and name not in METADATA


# Whether a file name is that of a file of each kind; the first kind that a folder has is read.
KINDS: dict[str, Callable[[str], bool]] = {
    **{kind: partial(_is_table, kind) for kind in TABLES},
    "imagefolder": is_image,
    "webdataset": is_shard,
}


def kind_of_folder(folder: Path) -> str:
    """The loader for a folder, from the file names in it and its subfolders, or else in the first deeper folder."""
    if (folder / SAVED_STATE).is_file() or (folder / SAVED_SPLITS).is_file():
        return "arrow"
    deeper = (files for _, files, _ in walk_folders(str(folder)))
    return next(filter(None, map(_kind_of, chain([names_near(folder)], deeper))), "imagefolder")


def _kind_of(names: Iterable[str]) -> str:
    found = {kind for name in set(names) for kind, fits in KINDS.items() if fits(name)}
    return next((kind for kind in KINDS if kind in found), "")


def names_near(folder: Path) -> Iterator[str]:
    """Names in a folder and its subfolders, except hidden ones."""
    for each in (folder, *(folder / name for name in folders_in(folder))):
        with suppress(OSError), os.scandir(each) as entries:
            yield from (entry.name for entry in entries if not entry.name.startswith("."))
