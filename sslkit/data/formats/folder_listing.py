"""List the image files below a folder, in a fixed order. No file is opened, and names may be of any bytes.

`datasets` takes minutes for a million files, silently skips dead links and pipes, and fails if a name is not UTF-8.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
SPAN = re.compile("\0@(\\d{1,19})\\+(-?\\d{1,19})(?=/)")  # between the names of a tar file and of a file in it
MAX_WAYS = 64  # to one folder, through links
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class WalkedFolder:
    """A folder and its files.

    Attributes:
        path: Its path, through links.
        files: Names of its files, sorted.
        linked: Whether its path goes through a link.
        links: Names of the files that are links.
    """

    path: str
    files: list[str]
    linked: bool
    links: frozenset[str]


@dataclass(frozen=True)
class ImageFolder:
    """A folder that directly contains images.

    Attributes:
        path: Its path, through links.
        images: Paths of its images, as `to_text` writes them.
        linked: See `WalkedFolder`.
        links: See `WalkedFolder`.
    """

    path: str
    images: pa.Array
    linked: bool
    links: frozenset[str]


@dataclass(frozen=True)
class Listing:
    """The images below a folder.

    Attributes:
        root: The folder.
        folders: All folders that directly contain images, in order.
        skipped: Number of other files, by suffix.
        example: Path of the first of them.
    """

    root: str
    folders: list[ImageFolder]
    skipped: Counter[str]
    example: str

    @property
    def classes(self) -> list[str] | None:
        """The name of each folder, or None if all images lie directly in the root."""
        if all(each.path == self.root for each in self.folders):
            return None
        return [display_path(os.path.basename(each.path)) for each in self.folders]


def list_images(root: Path) -> Listing:
    """Find every file below ``root`` whose name ends like that of an image, readable or not.

    Links to folders are followed, except to a folder above. Names that begin with a dot are skipped, and folders that
    begin with two underscores, as `datasets` does.

    Raises:
        UserError: A folder cannot be listed, or links form too many ways to one folder.
    """
    folders: list[ImageFolder] = []
    skipped: Counter[str] = Counter()
    example = ""
    for walked in walk_folders(str(root)):
        suffixes = [_suffix(name) for name in walked.files]
        images = [name for name, suffix in zip(walked.files, suffixes, strict=True) if suffix in SUFFIXES]
        if len(images) < len(walked.files):
            skipped.update(to_text(suffix) or "no suffix" for suffix in suffixes if suffix not in SUFFIXES)
            other = next(name for name, suffix in zip(walked.files, suffixes, strict=True) if suffix not in SUFFIXES)
            example = example or f"{walked.path}/{other}"
        if images:
            paths = pa.array([to_text(f"{walked.path}/{name}") for name in images], pa.string())
            folders.append(ImageFolder(walked.path, paths, walked.linked, walked.links))
    return Listing(str(root), folders, skipped, example)


def folders_with_images(root: Path) -> list[str]:
    """Paths of the folders that `list_images` finds images in."""
    return [each.path for each in walk_folders(str(root)) if any(_suffix(name) in SUFFIXES for name in each.files)]


def count_images(folder: Path) -> int:
    """Number of images directly in a folder."""
    return sum(_suffix(name) in SUFFIXES for name in next(walk_folders(str(folder))).files)


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


def walk_folders(folder: str) -> Iterator[WalkedFolder]:
    """Walk through a folder and everything below it, sorted; see `list_images` for what is skipped.

    Raises:
        UserError: A folder cannot be listed, or links form too many ways to one folder.
    """
    yield from _walk(folder, _folders_above(folder), linked=False, times=Counter())


def _folders_above(folder: str) -> tuple[tuple[int, int], ...]:
    """Identities of the folders that contain one, to which a link may lead back."""
    identities = []
    for parent in Path(os.path.realpath(folder)).parents:
        with suppress(OSError):
            identities.append(_identity(os.stat(parent)))
    return tuple(identities)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _walk(
    folder: str, above: tuple[tuple[int, int], ...], *, linked: bool, times: Counter[tuple[int, int]]
) -> Iterator[WalkedFolder]:
    try:
        identity = _identity(os.stat(folder))
        with os.scandir(folder) as entries:
            found = sorted(
                (entry.name, _is_folder(entry), entry.is_symlink())
                for entry in entries
                if not entry.name.startswith(".")
            )
    except OSError as error:
        raise UserError(f"[data] path: cannot list the folder {display_path(folder)}: {error.strerror}") from error
    if identity in above:
        return
    times[identity] += 1
    if times[identity] > MAX_WAYS:
        raise UserError(
            f"[data] path: links form more than {MAX_WAYS} ways to one folder, such as {display_path(folder)}; "
            "remove links between folders"
        )
    links = frozenset(name for name, is_dir, is_link in found if is_link and not is_dir)
    yield WalkedFolder(folder, [name for name, is_dir, _ in found if not is_dir], linked, links)
    for name, is_dir, is_link in found:
        if is_dir and not name.startswith("__"):
            yield from _walk(os.path.join(folder, name), (*above, identity), linked=linked or is_link, times=times)


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
    paths = compute.binary_join_element_wise(pa.scalar(f"{root}/"), names.combine_chunks(), "")
    return table_of_images(_image_cells(paths), {})


def table_of_folders(folders: Sequence[ImageFolder], classes: Sequence[str] | None) -> datasets.Dataset:
    """A column ``image`` of paths without bytes and, if each folder has a class, a column ``label``."""
    images = pa.chunked_array([_image_cells(each.images) for each in folders], datasets.Image().pa_type)
    if classes is None:
        return table_of_images(images, {})
    number = {name: index for index, name in enumerate(sorted(set(classes)))}
    labels = [
        pa.repeat(pa.scalar(number[name], pa.int64()), len(each.images))
        for name, each in zip(classes, folders, strict=True)
    ]
    return table_of_images(
        images, {"label": (pa.chunked_array(labels, pa.int64()), datasets.ClassLabel(names=list(number)))}
    )


def table_of_images(images: pa.Array | pa.ChunkedArray, columns: dict[str, tuple[Any, Any]]) -> datasets.Dataset:
    """A `datasets` table of a column ``image``, not decoded, and other columns with their types."""
    features = {"image": datasets.Image(decode=False), **{name: feature for name, (_, feature) in columns.items()}}
    table = pa.table({"image": images, **{name: values for name, (values, _) in columns.items()}})
    # One chunk, as looking up a row would be slow with a chunk for each of many folders.
    info = datasets.DatasetInfo(features=datasets.Features(features))
    return datasets.Dataset(table.combine_chunks(), info=info)


def _image_cells(paths: pa.Array) -> pa.StructArray:
    return pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
