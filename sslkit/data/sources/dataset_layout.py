"""What the keys of ``[data]`` name: files of which kind, in a folder or by patterns, or a dataset of the Hub."""

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sslkit.data.config import SourceConfig
from sslkit.data.formats.folder_listing import METADATA, SUFFIXES, folders_in, walk_folders
from sslkit.data.formats.tables import SAVED_SPLITS, SAVED_STATE
from sslkit.data.formats.tar_shards import is_shard
from sslkit.data.sources.bundled import BUILTIN
from sslkit.errors import UserError, near_miss

LOADERS = ("imagefolder", "parquet", "arrow", "webdataset")
TABLES = ("parquet", "arrow")
HUB, BUNDLED = "hub", "builtin"


@dataclass(frozen=True)
class DatasetLayout:
    """Where the images are, and what kind of files they are stored in.

    Attributes:
        loader: One of `LOADERS`, or `HUB` or `BUNDLED`.
        folder: The folder that contains all files of this kind, of which a split is chosen by name; or None.
        patterns: If there is no folder: paths or patterns of the files.
    """

    loader: str
    folder: Path | None = None
    patterns: tuple[str, ...] = ()


def detect_layout(config: SourceConfig) -> DatasetLayout:
    """Find out what a source names.

    Raises:
        UserError: It does not exist, or a key is given that does not apply to it.
    """
    if config.path.startswith(BUILTIN):
        return _bundled(config)
    if config.path in LOADERS:
        return _by_loader(config)
    path = Path(config.path).expanduser()
    if os.path.isdir(path):
        return _in_folder(config, path)
    pattern = is_shard(config.path) and any(char in config.path for char in "*?[{")
    if os.path.isfile(path) or pattern:
        _refuse(config, ("name", "data_dir", "data_files"), "a file")
        if is_shard(config.path):
            return DatasetLayout("webdataset", patterns=(config.path,))
        loader = next((kind for kind in TABLES if is_table(path.name, kind)), "")
        if not loader:
            raise UserError(
                f"[data] path: {config.path!r} is a file, but not a .parquet, .arrow or .tar file; for image files, "
                "give their folder"
            )
        return DatasetLayout(loader, patterns=(glob.escape(str(path)),))
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


def _bundled(config: SourceConfig) -> DatasetLayout:
    _refuse(config, ("data_files",), "a bundled data set")
    if config.data_dir is not None and config.name != "full":
        raise UserError(
            f"[data] data_dir: {config.path} comes with sslkit; to read all its images from the files in data_dir, "
            'give name = "full" too, else leave data_dir out'
        )
    return DatasetLayout(BUNDLED)


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
        raise UserError(f"[data] data_dir: no folder {str(folder)!r}")
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


def is_table(name: str, kind: str) -> bool:
    """Whether a file name is that of a table of this kind, and not that of a metadata table about image files."""
    return name.lower().endswith(f".{kind}") and name not in METADATA


KINDS: dict[str, Callable[[str], bool]] = {
    "webdataset": is_shard,
    "parquet": lambda name: is_table(name, "parquet"),
    "arrow": lambda name: is_table(name, "arrow"),
    "imagefolder": lambda name: name[name.rfind(".") :].lower() in SUFFIXES,
}


def kind_of_folder(folder: Path) -> str:
    """The loader for a folder, from the file names in it and its subfolders, or else in the first deeper folder."""
    if (folder / SAVED_STATE).is_file() or (folder / SAVED_SPLITS).is_file():
        return "arrow"
    return _kind_of(names_near(folder)) or _kind_of(_first_names(folder)) or "imagefolder"


def _kind_of(names: Iterable[str]) -> str:
    found = {kind for name in set(names) for kind, fits in KINDS.items() if fits(name)}
    return next((kind for kind in (*TABLES, "imagefolder", "webdataset") if kind in found), "")


def names_near(folder: Path) -> Iterator[str]:
    """Names in a folder and its subfolders, except hidden ones."""
    for each in (folder, *(folder / name for name in folders_in(folder))):
        with suppress(OSError), os.scandir(each) as entries:
            yield from (entry.name for entry in entries if not entry.name.startswith("."))


def _first_names(folder: Path) -> list[str]:
    """Names in the first folder below that has a file of a known kind."""
    return next((walked.files for walked in walk_folders(str(folder)) if _kind_of(walked.files)), [])
