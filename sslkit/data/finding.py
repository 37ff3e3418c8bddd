"""Where the images of a source are: a folder, parquet, arrow or tar files, a Hub dataset, or the bundled set."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import datasets

from sslkit.data.bundled import BUILTIN, load_bundled
from sslkit.data.config import SourceConfig
from sslkit.data.folder import SUFFIXES, folders_in, has_metadata, list_images
from sslkit.data.shards import find_shards, index_shards, is_shard
from sslkit.data.tables import map_arrow
from sslkit.errors import UserError, near_miss
from sslkit.parts.hub import quick_hub, why_not

LOADERS = ("imagefolder", "parquet", "arrow", "webdataset")
SPLITS = ("train", "test", "val", "validation")


def available_splits(config: SourceConfig) -> list[str]:
    """Names of the splits that can be asked of this source; empty where only trying would tell."""
    if config.path.startswith(BUILTIN):
        return ["train", "test"]
    folder = Path(config.data_dir or config.path)
    if folder.is_dir():
        named = _shards_by_split(folder)
        return [name for name in SPLITS if name in named or (folder / name).is_dir()] or ["train"]
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
    if by_split := _shards_by_split(folder):
        if split not in by_split:
            raise UserError(f"[data] split: {str(folder)!r} has tar files of {sorted(by_split)}, none of {split!r}")
        return by_split[split]
    root = _split_folder(folder, split)
    files = sorted(file for file in root.rglob("*") if is_shard(file.name))
    if not files:
        raise UserError(f"[data] path: {str(root)!r} holds no tar files")
    return files


def _shards_by_split(folder: Path) -> dict[str, list[Path]]:
    """The tar files of a folder without folders by the splits in their names, such as train-0000.tar."""
    files = sorted(file for file in folder.iterdir() if is_shard(file.name)) if not folders_in(folder) else []
    named: dict[str, list[Path]] = {}
    for file in files:
        if split := next(iter(_words(file.name) & set(SPLITS)), ""):
            named.setdefault(split, []).append(file)
    return named if sum(map(len, named.values())) == len(files) else {}


def _words(name: str) -> set[str]:
    return set(re.split("[^a-z]+", name.lower()))


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
        return config.path, [_folder_pattern(Path(config.data_dir), config.split, config.path)]
    path = Path(config.path).expanduser()
    if path.is_dir():
        loader = _loader_for_folder(path)
        return loader, [_folder_pattern(path, config.split, loader)]
    if path.is_file():
        loaders = {".parquet": "parquet", ".arrow": "arrow"}
        if path.suffix not in loaders:
            raise UserError(f"[data] path: {config.path!r} is a file but neither .parquet nor .arrow nor .tar")
        return loaders[path.suffix], [glob.escape(str(path))]
    if path.is_absolute() or config.path.count("/") != 1 or config.path.startswith((".", "~")):
        here = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"[data] path: no folder or file {config.path!r}{near_miss(path.name, here)}; a dataset of the Hub is "
            "written user/name"
        )
    return None, []


def _loader_for_folder(folder: Path) -> str:
    found = {name[name.rfind(".") :] for name in _names_near(folder)}
    loader = next((loader for loader in ("parquet", "arrow") if f".{loader}" in found), "imagefolder")
    with_images = not SUFFIXES.isdisjoint(map(str.lower, found))
    tars = loader == "imagefolder" and not with_images and any(map(is_shard, _names_near(folder)))
    return "webdataset" if tars else loader


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
        raise UserError(f"[data] image_column: no column of images found among {list(features)}; name it")
    return str((typed or named)[0])


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
