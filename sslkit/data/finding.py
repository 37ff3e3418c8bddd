"""Where the images of a source are: a folder, parquet, arrow or tar files, a Hub dataset, or the bundled set."""

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import datasets

from sslkit.data.bundled import BUILTIN, load_bundled
from sslkit.data.config import SourceConfig
from sslkit.data.folder import METADATA, SUFFIXES, folders_in, has_metadata, list_images, walk_folders
from sslkit.data.shards import find_shards, index_shards, is_shard
from sslkit.data.tables import load_parquet, map_arrow
from sslkit.errors import UserError, near_miss
from sslkit.parts.hub import quick_hub, why_not

LOADERS = ("imagefolder", "parquet", "arrow", "webdataset")
SPLITS = ("train", "test", "val", "validation")
TABLES = ("parquet", "arrow")


def available_splits(config: SourceConfig) -> list[str]:
    """Names of the splits that can be asked of this source; empty where only trying would tell."""
    if config.path.startswith(BUILTIN):
        return ["train", "test"]
    folder = Path(config.data_dir or config.path)
    if folder.is_dir():
        found = {*_files_by_split(folder, _loader_for(config, folder)), *folders_in(folder)}
        return [name for name in SPLITS if name in found] or ["train"]
    return []


def files_left_out(config: SourceConfig) -> Counter[str]:
    """How many files of a folder were not taken for images, by suffix; empty for data of another kind."""
    root = image_folder(config)
    return list_images(root).left_out if root and not has_metadata(root) else Counter()


def load_table(config: SourceConfig) -> datasets.Dataset:
    """The rows that ``config`` names, with all their columns; images are not decoded.

    Raises:
        UserError: There are none, or they cannot be loaded.
    """
    if config.path.startswith(BUILTIN):
        return load_bundled(config)
    if (root := image_folder(config)) and not has_metadata(root):
        return list_images(root).table
    if shards := _shards(config):
        return index_shards(shards, config.label_column)
    loader, files = _local_files(config)
    try:
        if loader is None:
            with quick_hub():
                return datasets.load_dataset(config.path, config.name, data_dir=config.data_dir, split=config.split)
        if loader == "arrow":
            return map_arrow(files)
        if loader == "parquet":
            return load_parquet(files)
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
        reason += _images_beside(config)
        raise UserError(f"[data] path: cannot load {describe(config)!r}: {where}{reason}") from error


def parquet_to_stream(config: SourceConfig) -> list[str] | None:
    """Patterns of the parquet files that a source would be made of, none for a dataset of the Hub; None: other files.

    Raises:
        UserError: There is nothing of that name.
    """
    if config.path.startswith(BUILTIN) or image_folder(config) or _shards(config):
        return None
    loader, patterns = _local_files(config)
    return patterns if loader in (None, "parquet") else None


def _shards(config: SourceConfig) -> list[Path]:
    """The tar files that hold the split; none where the data are of another kind."""
    if config.path == "webdataset" and config.data_files:
        return find_shards([config.data_files] if isinstance(config.data_files, str) else config.data_files)
    path = Path(config.data_dir or "" if config.path == "webdataset" else config.path).expanduser()
    if config.path == "webdataset" and not config.data_dir:
        raise UserError("[data] data_dir: path = 'webdataset' needs data_dir or data_files")
    if config.path == "webdataset" or (
        config.path not in LOADERS and path.is_dir() and _loader_for_folder(path) == "webdataset"
    ):
        return _shards_below(path, config.split)
    named = is_shard(config.path) and (path.is_file() or any(char in config.path for char in "*?[{"))
    return find_shards([config.path]) if named else []


def _shards_below(folder: Path, split: str) -> list[Path]:
    files = _files_of(folder, split, "webdataset")
    if not files:
        raise UserError(f"[data] path: {str(folder)!r} holds no tar files")
    return files


def _files_of(folder: Path, split: str, loader: str) -> list[Path]:
    """The tables or tar files of one split of a folder."""
    if by_split := _files_by_split(folder, loader):
        if split not in by_split:
            what = "tar" if loader == "webdataset" else loader
            raise UserError(f"[data] split: {str(folder)!r} has {what} files of {sorted(by_split)}, none of {split!r}")
        return by_split[split]
    return _files_below(_split_folder(folder, split), loader)


def _files_by_split(folder: Path, loader: str) -> dict[str, list[Path]]:
    """The tables or tar files of a folder by the splits that they are named after; empty if not all are.

    So ``train-0000.tar``, ``data/train-00000-of-00004.parquet`` and ``default/train/0000.parquet``. Where the folder's
    own folders are the splits, they are told by them alone.
    """
    if loader == "imagefolder" or set(folders_in(folder)) & set(SPLITS):
        return {}
    files = _files_below(folder, loader)
    named: dict[str, list[Path]] = {}
    for file in files:
        if split := _split_named(file.relative_to(folder)):
            named.setdefault(split, []).append(file)
    if sum(map(len, named.values())) == len(files):
        return named
    if len(named) > 1:
        other = next(file for file in files if not _split_named(file.relative_to(folder)))
        raise UserError(
            f"[data] path: {str(folder)!r} has files of the splits {sorted(named)} and others, such as {other.name!r}; "
            f"put them into folders ({', '.join(SPLITS)}), or name files by data_files"
        )
    return {}


def _split_named(file: Path) -> str:
    """The one split that a file's name has as a word, or else the nearest of its folders; empty for none or several."""
    for part in reversed(file.parts):
        words = set(re.split("[^a-z]+", part.lower())) & set(SPLITS)
        if words:
            return words.pop() if len(words) == 1 else ""
    return ""


def _files_below(folder: Path, loader: str) -> list[Path]:
    fits = _KINDS[loader]
    return sorted(Path(place, name) for place, names in walk_folders(str(folder)) for name in names if fits(name))


def _is_table(name: str, kind: str) -> bool:
    return name.lower().endswith(f".{kind}") and name not in METADATA


_KINDS: dict[str, Callable[[str], bool]] = {
    "webdataset": is_shard,
    "parquet": lambda name: _is_table(name, "parquet"),
    "arrow": lambda name: _is_table(name, "arrow"),
    "imagefolder": lambda name: name[name.rfind(".") :].lower() in SUFFIXES,
}


def image_folder(config: SourceConfig) -> Path | None:
    """The folder below which every image is one of the split, or None where the data are of another kind."""
    if config.path == "imagefolder" and config.data_dir and not config.data_files:
        return _split_folder(Path(config.data_dir), config.split)
    path = Path(config.path).expanduser()
    if config.path not in LOADERS and path.is_dir() and _loader_for_folder(path) == "imagefolder":
        return _split_folder(path, config.split)
    return None


def folder_of_table(config: SourceConfig) -> str:
    """The folder of a local table, which its rows' files must lie in; the rows of tar files are our own."""
    place = Path(config.data_dir or config.path).expanduser()
    if config.path.startswith(BUILTIN) or config.data_files or image_folder(config) or not place.exists():
        return ""
    if _shards(config):
        return ""
    return str((place if place.is_dir() else place.parent).resolve())


def describe(config: SourceConfig) -> str:
    """The words that tell a user which source is meant."""
    return str(config.data_dir or config.data_files) if config.path in LOADERS else config.path


def _local_files(config: SourceConfig) -> tuple[str | None, list[str]]:
    """The `datasets` loader for local files and the patterns to give it; no loader means a Hub id."""
    if config.path in LOADERS:
        if config.data_files:
            files = [config.data_files] if isinstance(config.data_files, str) else config.data_files
            return config.path, files
        if not config.data_dir:
            raise UserError(f"[data] data_dir: path = {config.path!r} needs data_dir or data_files")
        return config.path, _patterns(Path(config.data_dir), config.split, config.path)
    path = Path(config.path).expanduser()
    if path.is_dir():
        loader = _loader_for_folder(path)
        return loader, _patterns(path, config.split, loader)
    if path.is_file():
        loader = next((kind for kind in TABLES if _is_table(path.name, kind)), "")
        if not loader:
            raise UserError(
                f"[data] path: {config.path!r} is a file but neither .parquet nor .arrow nor .tar; several images are "
                "named by their folder"
            )
        return loader, [glob.escape(str(path))]
    if path.is_absolute() or config.path.count("/") != 1 or config.path.startswith((".", "~")):
        here = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"[data] path: no folder or file {config.path!r}{near_miss(path.name, here)}; a dataset of the Hub is "
            "written user/name"
        )
    return None, []


def _loader_for(config: SourceConfig, folder: Path) -> str:
    return config.path if config.path in LOADERS else _loader_for_folder(folder)


def _loader_for_folder(folder: Path) -> str:
    """What a folder holds, by the names in it and right below; where they tell nothing, by the first deeper one."""
    return _loader_told_by(_names_near(folder)) or _loader_told_by(_first_names(folder)) or "imagefolder"


def _loader_told_by(names: Iterable[str]) -> str:
    found = {kind for name in set(names) for kind, fits in _KINDS.items() if fits(name)}
    return next((kind for kind in (*TABLES, "imagefolder", "webdataset") if kind in found), "")


def _names_near(folder: Path) -> Iterator[str]:
    """Names in a folder and in those right below it, but for hidden ones."""
    places = [folder, *(folder / name for name in folders_in(folder))]
    for place in places:
        with suppress(OSError), os.scandir(place) as entries:
            yield from (entry.name for entry in entries if not entry.name.startswith("."))


def _first_names(folder: Path) -> list[str]:
    """The names in the first folder below that has a file of a known kind."""
    return next((names for _, names in walk_folders(str(folder)) if _loader_told_by(names)), [])


def _patterns(folder: Path, split: str, loader: str) -> list[str]:
    if loader == "imagefolder":
        return [f"{glob.escape(str(_split_folder(folder, split)))}/**"]
    files = _files_of(folder, split, loader)
    if not files:
        raise UserError(f"[data] path: {str(folder)!r} holds no {loader} files")
    return [glob.escape(str(file)) for file in files]


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
    if not any(names for _, names in walk_folders(str(root))):
        raise UserError(f"[data] path: the folder {str(root)!r} is empty")
    return root


def _has_class_folders(patterns: list[str]) -> bool:
    roots = [pattern.removesuffix("/**") for pattern in patterns if pattern.endswith("/**")]
    return any(Path(entry).is_dir() for root in roots for entry in glob.glob(f"{root}/*"))


def find_image_column(features: datasets.Features, config: SourceConfig) -> str:
    """The column of images that ``config`` names, or else the first of their type, or of a usual name.

    Raises:
        UserError: There is none.
    """
    if config.image_column is not None:
        return _named_column(features, "image_column", config.image_column)
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    named = [name for name in ("image", "img", "jpg", "png") if name in features]
    if not typed and not named:
        there = f"{list(features)}; name it{_images_beside(config)}"
        raise UserError(f"[data] image_column: no column of images found among {there}")
    return str((typed or named)[0])


def _images_beside(config: SourceConfig) -> str:
    """What to do where a table among image files was taken for the data."""
    folder = Path(config.path).expanduser()
    if config.path in LOADERS or not folder.is_dir() or not any(map(_KINDS["imagefolder"], _names_near(folder))):
        return ""
    return f', or, for the image files beside it, write path = "imagefolder" and data_dir = "{folder}"'


def find_label_column(features: datasets.Features, config: SourceConfig) -> str | None:
    """The column of labels that ``config`` names, or else the first of their type, or of a usual name, or None.

    Raises:
        UserError: There is none of the name given.
    """
    if config.label_column is not None:
        return _named_column(features, "label_column", config.label_column)
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    plain = [name for name, feature in features.items() if isinstance(feature, datasets.Value)]
    named = [name for name in ("label", "labels", "cls") if name in plain]
    return next(iter(typed + named), None)


def _named_column(features: datasets.Features, key: str, name: str) -> str:
    if name not in features:
        raise UserError(f"[data] {key}: no column {name!r}{near_miss(name, features)}; there are {list(features)}")
    return name
