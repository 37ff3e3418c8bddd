"""Digests that tell whether two sources hold the same images, by name, by content or by file.

- `names_digest`: number and names of the images. Opens no file. Run folders store it in ``data.json``.
- `images_digest`: names, sizes and the content of a sample. Protocols of evaluations store it.
- `source_fingerprint`: paths, sizes and modification times. It is part of the key of stored features.

The first two stay the same when a data set is moved or copied.
"""

import hashlib
import os
from collections.abc import Callable

import numpy as np
from pyarrow import compute

from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.formats.folder_listing import printable, to_path
from sslkit.data.sources.image_source import ImageSource

SAMPLE_SIZE = 256  # images of which `images_digest` reads the content


def names_digest(source: ImageSource) -> str:
    """SHA-256 of the number of images and their names below their common folder.

    Images stored in the table count by their size in bytes as well. Takes about 1 second for a million images.
    """
    if digest := source.table.digest():
        return digest
    root = _root_length(source, skip_empty=False)
    sha = hashlib.sha256(str(len(source)).encode())
    for images in source.table.cells(4096):
        sizes = compute.binary_length(images.field("bytes")).to_pylist()
        for path, size in zip(images.field("path").to_pylist(), sizes, strict=True):
            sha.update(f"{(path or '')[root:]}\0{size}\0".encode())
    return sha.hexdigest()


def images_digest(source: ImageSource) -> str:
    """First 16 hexadecimal digits of a SHA-256 of the images, in order.

    Images stored in the table count by their bytes. Files count by name below their common folder and size, and
    `SAMPLE_SIZE` of them also by their bytes. Takes about 1 second for 100 000 files. Unreadable files are allowed.
    """
    if digest := source.table.digest():
        return digest[:16]
    root = _root_length(source, skip_empty=True)
    sha = hashlib.sha256(str(len(source)).encode())
    has_files = False
    for cells in source.table.cells(256):
        for cell in cells.to_pylist():
            if cell and cell["bytes"] is not None:
                sha.update(hashlib.sha256(cell["bytes"]).digest())
            else:
                path = (cell or {}).get("path") or ""
                sha.update(f"{path[root:]}\0{file_size(path)}\0".encode())
                has_files = True
    for index in spread_sample(len(source), SAMPLE_SIZE) if has_files else ():
        sha.update(bytes.fromhex(image_digest(source, index)) or b"unreadable")
    return sha.hexdigest()[:16]


def source_fingerprint(source: ImageSource) -> str:
    """SHA-256 of the images' bytes, or of the files' paths, sizes and modification times.

    Raises:
        UnreadableImage: A file is missing.
    """
    if digest := source.table.digest():
        return digest
    sha = hashlib.sha256()
    for cells in source.table.cells(256):
        for cell in cells.to_pylist():
            if cell["bytes"] is not None:
                sha.update(hashlib.sha256(cell["bytes"]).digest())
                continue
            try:
                status = os.stat(to_path(cell["path"]))
            except OSError as error:
                raise UnreadableImage(printable(cell["path"]), error.strerror or str(error)) from error
            sha.update(f"{cell['path']}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return sha.hexdigest()


def image_digest(source: ImageSource, index: int) -> str:
    """SHA-256 of one image's encoded bytes; empty if it cannot be read."""
    return content_digest(lambda: source.encoded(index)[1])


def content_digest(read: Callable[[], bytes]) -> str:
    """SHA-256 of the bytes that ``read`` returns; empty if it raises OSError or UnreadableImage."""
    try:
        return hashlib.sha256(read()).hexdigest()
    except (OSError, UnreadableImage):
        return ""


def file_size(path: str) -> int:
    """Size in bytes of the file that a path of `ImageSource.paths` names; -1 if there is none."""
    try:
        return os.stat(to_path(path)).st_size if path else -1
    except OSError:
        return -1


def spread_sample(count: int, size: int) -> list[int]:
    """At most ``size`` positions below ``count``, ascending and evenly spread."""
    return [int(index) for index in np.unique(np.linspace(0, count - 1, min(count, size), dtype=np.int64))]


def _root_length(source: ImageSource, *, skip_empty: bool) -> int:
    """Length of the folder path with which all paths begin."""
    ends: list[str] = []
    for images in source.table.cells(4096):
        paths = images.field("path")
        if skip_empty:
            paths = paths.filter(compute.not_equal(paths, ""))
        bounds = compute.min_max(paths).as_py()
        ends = [end for end in (*ends, *bounds.values()) if end is not None]
        ends = [min(ends), max(ends)] if ends else []
    return os.path.commonprefix(ends).rfind("/") + 1  # noqa: RUF071 - cut at a slash
