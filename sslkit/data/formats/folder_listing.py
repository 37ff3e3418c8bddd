"""The images below a folder, in a fixed order. Names may be of any bytes; nothing is opened.

`datasets` would find them too, but takes minutes for a million, leaves out dead links and pipes without a word, and
fails on a name that is not UTF-8.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
from pyarrow import compute

from sslkit.errors import UserError
from sslkit.text import escape

SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif"),
    )
)
PLACE = re.compile("\0@(\\d{1,19})\\+(-?\\d{1,19})(?=/)")  # between a tar file's name and that of a file in it
MAX_WAYS = 64  # to one folder, over links
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class Visited:
    """A folder that was walked through.

    Attributes:
        path: Its path, by way of links.
        names: Names of its files, sorted.
        linked: Whether the way to it leads over a link.
        links: Those of the names that are links.
    """

    path: str
    names: list[str]
    linked: bool
    links: frozenset[str]


@dataclass(frozen=True)
class ImageFolder:
    """A folder with images right in it: its path, the images' paths as `to_text` writes them, and see `Visited`."""

    path: str
    images: pa.Array
    linked: bool
    links: frozenset[str]


@dataclass(frozen=True)
class Listing:
    """What lies below a folder.

    Attributes:
        root: The folder.
        folders: Those with images, in order.
        left_out: How many files were not taken for images, by suffix.
        example: The first of these.
    """

    root: str
    folders: list[ImageFolder]
    left_out: Counter[str]
    example: str

    @property
    def classes(self) -> list[str] | None:
        """The name of each folder, or None where all images lie right in the root."""
        if all(each.path == self.root for each in self.folders):
            return None
        return [printable(to_text(os.path.basename(each.path))) for each in self.folders]

    @property
    def table(self) -> datasets.Dataset:
        """A column ``image`` of paths without bytes and, where there are folders below, a ``label`` by folder."""
        return table_of_folders(self.folders, self.classes)


def list_images(root: Path) -> Listing:
    """Find every file below ``root`` whose name ends like an image's, be it readable or not.

    Folders that are links are followed, though never back up. Names that begin with a dot are left out, and folders
    that begin with two underscores, as `datasets` does.

    Raises:
        UserError: A folder cannot be listed, or links lead round and round.
    """
    folders: list[ImageFolder] = []
    left_out: Counter[str] = Counter()
    example = ""
    for visited in walk_folders(str(root)):
        folder, names = visited.path, visited.names
        suffixes = [_suffix(name) for name in names]
        images = [name for name, suffix in zip(names, suffixes, strict=True) if suffix in SUFFIXES]
        if len(images) < len(names):
            left_out.update(to_text(suffix) or "no suffix" for suffix in suffixes if suffix not in SUFFIXES)
            other = next(name for name, suffix in zip(names, suffixes, strict=True) if suffix not in SUFFIXES)
            example = example or f"{folder}/{other}"
        if images:
            paths = pa.array([to_text(f"{folder}/{name}") for name in images], pa.string())
            folders.append(ImageFolder(folder, paths, visited.linked, visited.links))
    return Listing(str(root), folders, left_out, example)


def folders_with_images(root: Path) -> list[str]:
    """Paths of the folders that `list_images` finds images in."""
    return [
        visited.path for visited in walk_folders(str(root)) if any(_suffix(name) in SUFFIXES for name in visited.names)
    ]


def count_images(folder: Path) -> int:
    """How many images lie right in a folder, by their names."""
    return sum(_suffix(name) in SUFFIXES for name in next(walk_folders(str(folder))).names)


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in a folder that are looked into, links to folders too, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith((".", "__")) and _is_folder(entry))


def has_metadata(root: Path) -> bool:
    """Whether a file that `datasets` reads columns from lies in the folder or in one right below it."""
    places = [root, *(root / name for name in folders_in(root))]
    return any(os.path.lexists(place / name) for place in places for name in METADATA)


def to_text(path: str) -> str:
    """A path as valid text: a byte that is not UTF-8 becomes NUL, which no path has, and two digits."""
    if path.isascii():  # nearly all are, and there may be millions
        return path
    return re.sub("[\udc80-\udcff]", lambda found: f"\0{ord(found[0]) & 0xFF:02x}", path)


def to_path(text: str) -> Path:
    """The path that `to_text` made text of; of a place in a tar file, the tar file's."""
    file = PLACE.split(text, maxsplit=1)[0]
    return Path(re.sub("\0(..)", lambda found: chr(0xDC00 + int(found[1], 16)), file))


def place_in(shard: str, offset: int, size: int, name: str) -> str:
    """A place in a tar file as text: beside the file's and the image's names, which bytes of it are the image."""
    return f"{shard}\0@{offset}+{size}/{name}"


def span_of(text: str) -> tuple[int, int] | None:
    """Offset and size of a place in a tar file; None for a file of its own."""
    found = PLACE.search(text)
    return (int(found[1]), int(found[2])) if found else None


def printable(text: str) -> str:
    """A path's text for people, on one line: what is not printable is escaped."""
    return escape(re.sub("\0(..)", r"\\x\1", PLACE.sub("", text, count=1)))


def walk_folders(folder: str) -> Iterator[Visited]:
    """Every folder from one on down, and the files in it, sorted; see `list_images` for which.

    Raises:
        UserError: A folder cannot be listed, or links lead round and round.
    """
    yield from _walk(folder, _folders_above(folder), linked=False, times=Counter())


def _folders_above(folder: str) -> tuple[tuple[int, int], ...]:
    """Identities of the folders that one lies in, which a link may lead back to."""
    identities = []
    for parent in Path(os.path.realpath(folder)).parents:
        with suppress(OSError):
            identities.append(_identity(os.stat(parent)))
    return tuple(identities)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _walk(
    folder: str, above: tuple[tuple[int, int], ...], *, linked: bool, times: Counter[tuple[int, int]]
) -> Iterator[Visited]:
    try:
        identity = _identity(os.stat(folder))
        with os.scandir(folder) as entries:
            seen = sorted(
                (entry.name, _is_folder(entry), entry.is_symlink())
                for entry in entries
                if not entry.name.startswith(".")
            )
    except OSError as error:
        raise UserError(
            f"[data] path: cannot list the folder {printable(to_text(folder))}: {error.strerror}"
        ) from error
    if identity in above:
        return
    times[identity] += 1
    if times[identity] > MAX_WAYS:
        raise UserError(
            f"[data] path: {printable(to_text(folder))} is one of more than {MAX_WAYS} ways to the same folder over "
            "links; remove links that lead from folder to folder"
        )
    links = frozenset(name for name, is_dir, is_link in seen if is_link and not is_dir)
    yield Visited(folder, [name for name, is_dir, _ in seen if not is_dir], linked, links)
    for name, is_dir, is_link in seen:
        if is_dir and not name.startswith("__"):
            yield from _walk(os.path.join(folder, name), (*above, identity), linked=linked or is_link, times=times)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round in a circle
        return False


def _suffix(name: str) -> str:
    """Of a name that does not begin with a dot, as `os.path.splitext` has it, in small letters."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def table_of(names: pa.ChunkedArray, root: str) -> datasets.Dataset:
    """A column ``image`` of files by their names below ``root``, in this order, be they there or not."""
    paths = compute.binary_join_element_wise(pa.scalar(f"{root}/"), names.combine_chunks(), "")
    image = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return datasets.Dataset(pa.table({"image": image}), info=datasets.DatasetInfo(features=features))


def table_of_folders(folders: Sequence[ImageFolder], classes: Sequence[str] | None) -> datasets.Dataset:
    """A column ``image`` of paths without bytes and, where each folder has a class, a ``label``."""
    images = [
        pa.StructArray.from_arrays([pa.nulls(len(each.images), pa.binary()), each.images], ["bytes", "path"])
        for each in folders
    ]
    features = {"image": datasets.Image(decode=False)}
    columns = {"image": pa.chunked_array(images, features["image"].pa_type)}
    if classes is not None:
        number = {name: place for place, name in enumerate(sorted(set(classes)))}
        labels = [
            pa.repeat(pa.scalar(number[name], pa.int64()), len(each.images))
            for name, each in zip(classes, folders, strict=True)
        ]
        columns["label"] = pa.chunked_array(labels, pa.int64())
        features["label"] = datasets.ClassLabel(names=list(number))
    # A row group for each folder would make looking up a row slow where folders are many.
    table = pa.table(columns).combine_chunks()
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=datasets.Features(features)))
