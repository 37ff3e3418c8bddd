"""What ``[data] path`` and its companions name: files of which kind, below a folder or by patterns, or the Hub."""

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sslkit.data.config import SourceConfig
from sslkit.data.formats.folder_listing import METADATA, SUFFIXES, folders_in, walk_folders
from sslkit.data.formats.saved_datasets import SPLITS, STATE
from sslkit.data.formats.tar_shards import is_shard
from sslkit.data.sources.bundled import BUILTIN
from sslkit.errors import UserError, near_miss

LOADERS = ("imagefolder", "parquet", "arrow", "webdataset")
TABLES = ("parquet", "arrow")
HUB, BUNDLED = "hub", "builtin"


@dataclass(frozen=True)
class Place:
    """Where images are.

    Attributes:
        loader: One of `LOADERS`, or `HUB` or `BUNDLED`.
        folder: Everything of that kind below it, of which a split is chosen by names.
        patterns: Or the files by their names or patterns.
    """

    loader: str
    folder: Path | None = None
    patterns: tuple[str, ...] = ()


def place_of(config: SourceConfig) -> Place:
    """What a source names.

    Raises:
        UserError: Nothing is there of that name, or a key is given that means nothing there.
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
            return Place("webdataset", patterns=(config.path,))
        loader = next((kind for kind in TABLES if is_table(path.name, kind)), "")
        if not loader:
            raise UserError(
                f"[data] path: {config.path!r} is a file but neither .parquet nor .arrow nor .tar; several images are "
                "named by their folder"
            )
        return Place(loader, patterns=(glob.escape(str(path)),))
    if path.is_absolute() or config.path.count("/") != 1 or config.path.startswith((".", "~")):
        here = [entry.name for entry in path.parent.iterdir()] if os.path.isdir(path.parent) else []
        raise UserError(
            f"[data] path: no folder or file {config.path!r}{near_miss(path.name, here)}; a dataset of the Hub is "
            "written user/name"
        )
    return Place(HUB)


def describe(config: SourceConfig) -> str:
    """The words that tell a user which source is meant."""
    if config.path in LOADERS:
        return str(config.data_dir or config.data_files)
    return f"{config.path}/{config.data_dir}" if config.data_dir and os.path.isdir(config.path) else config.path


def _bundled(config: SourceConfig) -> Place:
    _refuse(config, ("data_files",), "a bundled set")
    if config.data_dir is not None and config.name != "full":
        raise UserError(
            f'[data] data_dir: {config.path} comes with sslkit; give name = "full" too, to read all its images from '
            "the files in data_dir, or leave data_dir out"
        )
    return Place(BUNDLED)


def _by_loader(config: SourceConfig) -> Place:
    _refuse(config, ("name",), "local files")
    if config.data_files:
        files = [config.data_files] if isinstance(config.data_files, str) else config.data_files
        if config.data_dir:
            files = [each if "://" in each else os.path.join(config.data_dir, each) for each in files]
        return Place(config.path, patterns=tuple(files))
    if not config.data_dir:
        raise UserError(f"[data] data_dir: path = {config.path!r} needs data_dir or data_files")
    folder = Path(config.data_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"[data] data_dir: no folder {str(folder)!r}")
    return Place(config.path, folder)


def _in_folder(config: SourceConfig, path: Path) -> Place:
    """A folder, or the one in it that ``data_dir`` names."""
    if config.data_files is not None:
        kind = kind_of_folder(path)
        files = [config.data_files] if isinstance(config.data_files, str) else config.data_files
        raise UserError(
            f'[data] data_files: goes with path = "{kind}", not with a folder; write path = "{kind}" and '
            f"data_files = {[os.path.join(config.path, each) for each in files]}, or leave data_files out"
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
    return Place(kind_of_folder(path), path)


def _refuse(config: SourceConfig, keys: Iterable[str], what: str) -> None:
    for key in keys:
        if (value := getattr(config, key)) is not None:
            option = " (--name or --data-name)" if key == "name" else ""
            meaning = "chooses a configuration of a Hub dataset" if key == "name" else "goes with a folder or a loader"
            raise UserError(
                f"[data] {key}: {value!r} {meaning}, and {config.path!r} is {what}, which has none; leave {key} out"
                f"{option}"
            )


def is_table(name: str, kind: str) -> bool:
    """Whether a file is named like a table of this kind that holds data, not like one about image files."""
    return name.lower().endswith(f".{kind}") and name not in METADATA


KINDS: dict[str, Callable[[str], bool]] = {
    "webdataset": is_shard,
    "parquet": lambda name: is_table(name, "parquet"),
    "arrow": lambda name: is_table(name, "arrow"),
    "imagefolder": lambda name: name[name.rfind(".") :].lower() in SUFFIXES,
}


def kind_of_folder(folder: Path) -> str:
    """What a folder holds, by the names in it and right below; where they tell nothing, by the first deeper one."""
    if (folder / STATE).is_file() or (folder / SPLITS).is_file():
        return "arrow"
    return _told_by(names_near(folder)) or _told_by(_first_names(folder)) or "imagefolder"


def _told_by(names: Iterable[str]) -> str:
    found = {kind for name in set(names) for kind, fits in KINDS.items() if fits(name)}
    return next((kind for kind in (*TABLES, "imagefolder", "webdataset") if kind in found), "")


def names_near(folder: Path) -> Iterator[str]:
    """Names in a folder and in those right below it, but for hidden ones."""
    places = [folder, *(folder / name for name in folders_in(folder))]
    for place in places:
        with suppress(OSError), os.scandir(place) as entries:
            yield from (entry.name for entry in entries if not entry.name.startswith("."))


def _first_names(folder: Path) -> list[str]:
    """The names in the first folder below that has a file of a known kind."""
    return next((visited.names for visited in walk_folders(str(folder)) if _told_by(visited.names)), [])
