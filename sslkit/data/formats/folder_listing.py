"""List the image files below a folder, in a fixed order. No file is opened, and names may be of any bytes.

`datasets` takes minutes for a million files, silently skips dead links and pipes, and fails if a name is not UTF-8.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
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
SPAN = re.compile("\0@(\\d{1,19})\\+(-?\\d{1,19})(?=/)")  # between the names of a tar file and of a file in it
MAX_WAYS = 64  # to one folder, through links
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class ImageFolder:
    """A folder that directly contains images."""

    path: str  # through links
    images: pa.Array  # paths of its images, as `to_text` writes them
    links: list[str]  # names of the files that are links


@dataclass(frozen=True)
class Listing:
    """The images below a folder."""

    root: str
    folders: list[ImageFolder]  # all folders that directly contain images, in order
    skipped: Counter[str]  # number of other files, by suffix
    example: str  # path of the first of them

    @property
    def classes(self) -> list[str] | None:
        """The name of each folder, or None if all images lie directly in the root."""
        if all(each.path == self.root for each in self.folders):
            return None
        return [display_path(os.path.basename(each.path)) for each in self.folders]


def list_images(root: Path, inside: Sequence[Path] = ()) -> Listing:
    """Find every file below ``root`` whose name ends like that of an image, readable or not; see `walk_folders`.

    If folders below it are given as ``inside``, only these are searched.
    """
    folders: list[ImageFolder] = []
    skipped: Counter[str] = Counter()
    example = ""
    for folder, files, links in chain.from_iterable(walk_folders(str(each)) for each in inside or [root]):
        images: list[str] = []
        others: list[str] = []
        for name in files:
            (images if is_image(name) else others).append(name)
        if others:
            skipped.update(to_text(_suffix(name)) or "no suffix" for name in others)
            example = example or f"{folder}/{others[0]}"
        if images:
            paths = pa.array([to_text(f"{folder}/{name}") for name in images], pa.string())
            folders.append(ImageFolder(folder, paths, links))
    return Listing(str(root), folders, skipped, example)


def is_image(name: str) -> bool:
    """Whether a file name ends like that of an image."""
    return _suffix(name) in SUFFIXES


def folders_in(folder: Path) -> list[str]:
    """Sorted names of the subfolders that are searched, including links to folders."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith((".", "__")) and _is_folder(entry))


def to_text(path: str) -> str:
    """Write a path as valid text: a byte that is not UTF-8 becomes NUL, which no path contains, and two hex digits."""
    if path.isascii():  # as nearly all are, and there may be millions
        return path
    return re.sub("[\udc80-\udcff]", lambda found: f"\0{ord(found[0]) & 0xFF:02x}", path)


def to_path(text: str) -> Path:
    """The path that `to_text` wrote; of a file in a tar file, the path of the tar file."""
    file = SPAN.split(text, maxsplit=1)[0]
    return Path(re.sub("\0(..)", lambda found: chr(0xDC00 + int(found[1], 16)), file))


def member_text(shard: str, offset: int, size: int, name: str) -> str:
    """Write a file in a tar file as text: the tar file's path, the bytes of the file, and its name."""
    return f"{shard}\0@{offset}+{size}/{name}"


def span_of(text: str) -> tuple[int, int] | None:
    """Offset and size of a file in a tar file, from `member_text`; None for a file of its own."""
    found = SPAN.search(text)
    return (int(found[1]), int(found[2])) if found else None


def printable(text: str) -> str:
    """A path's text for messages, on one line, with unprintable characters escaped."""
    return escape(re.sub("\0(..)", r"\\x\1", SPAN.sub("", text, count=1)))


def display_path(path: str | bytes | Path) -> str:
    """A path for messages, on one line, with unprintable characters escaped."""
    return printable(to_text(os.fsdecode(path)))


def walk_folders(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield a folder and all folders below it, sorted: the path, the names of its files, and those that are links.

    Links to folders are followed, except to a folder above. Names that begin with a dot are skipped, and folders that
    begin with two underscores, as `datasets` does. A folder that cannot be listed, or links that form too many ways to
    one folder, raise `UserError`.
    """
    parents = Path(os.path.realpath(root)).parents  # to which a link may lead back
    pending = [(root, tuple(_identity(parent) for parent in parents if os.path.exists(parent)))]
    visits = Counter[tuple[int, int]]()
    while pending:
        folder, above = pending.pop()
        try:
            identity = _identity(folder)
            with os.scandir(folder) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
                found = sorted((entry.name, _is_folder(entry), entry.is_symlink()) for entry in visible)
        except OSError as error:
            raise UserError(f"[data] path: cannot list the folder {display_path(folder)}: {error.strerror}") from error
        if identity in above:
            continue
        visits[identity] += 1
        if visits[identity] > MAX_WAYS:
            raise UserError(
                f"[data] path: links form more than {MAX_WAYS} ways to one folder, such as {display_path(folder)}; "
                "remove links between folders"
            )
        links = [name for name, is_dir, is_link in found if is_link and not is_dir]
        yield folder, [name for name, is_dir, _ in found if not is_dir], links
        inner = [os.path.join(folder, name) for name, is_dir, _ in found if is_dir and not name.startswith("__")]
        pending += [(path, (*above, identity)) for path in reversed(inner)]


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _suffix(name: str) -> str:
    """Lower-case suffix of a name that does not begin with a dot, like `os.path.splitext`."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def table_of(names: pa.ChunkedArray, root: str) -> datasets.Dataset:
    """A column ``image`` of files by their names below ``root``, in this order; the files need not exist."""
    return table_of_images(compute.binary_join_element_wise(pa.scalar(f"{root}/"), names, ""), {})


def table_of_folders(folders: Sequence[ImageFolder], classes: Sequence[str] | None) -> datasets.Dataset:
    """A column ``image`` of paths without bytes and, if each folder has a class, a column ``label``."""
    images = pa.chunked_array([each.images for each in folders], pa.string())
    if classes is None:
        return table_of_images(images, {})
    number = {name: index for index, name in enumerate(sorted(set(classes)))}
    labels = np.repeat([number[name] for name in classes], [len(each.images) for each in folders])
    return table_of_images(images, {"label": (pa.array(labels, pa.int64()), datasets.ClassLabel(names=list(number)))})


def table_of_images(paths: pa.ChunkedArray, columns: dict[str, tuple[Any, Any]]) -> datasets.Dataset:
    """A `datasets` table of a column ``image``, not decoded, and other columns with their types."""
    cells = [
        pa.StructArray.from_arrays([pa.nulls(len(each), pa.binary()), each], ["bytes", "path"]) for each in paths.chunks
    ]
    images = pa.chunked_array(cells, datasets.Image().pa_type)
    features = {"image": datasets.Image(decode=False), **{name: feature for name, (_, feature) in columns.items()}}
    table = pa.table({"image": images, **{name: values for name, (values, _) in columns.items()}})
    # One chunk, as looking up a row would be slow with a chunk for each of many folders.
    info = datasets.DatasetInfo(features=datasets.Features(features))
    return datasets.Dataset(table.combine_chunks(), info=info)
