"""Digests that tell whether two sources hold the same images, by name, by content or by file."""

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
    """SHA-256 of the number of images and their names below their common folder. Run folders store it.

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
    """First 16 hexadecimal digits of a SHA-256 of the images, in order. Protocols of evaluations store it.

    Images stored in the table count by their bytes. Files count by name below their common folder and size, and
    `SAMPLE_SIZE` of them also by their bytes. Takes about 1 second for 100 000 files. Unreadable files are allowed.
    """
    if digest := source.table.digest():
        return digest[:16]
    root = _root_length(source, skip_empty=True)
    sha = hashlib.sha256(str(len(source)).encode())
    has_files = _update(sha, source, lambda path: f"{path[root:]}\0{file_size(path)}\0")
    for index in spread_sample(len(source), SAMPLE_SIZE) if has_files else ():
        sha.update(bytes.fromhex(image_digest(source, index)) or b"unreadable")
    return sha.hexdigest()[:16]


def source_fingerprint(source: ImageSource) -> str:
    """SHA-256 of the images' bytes, or of the files' paths, sizes and modification times, for stored features.

    A missing file raises `UnreadableImage`.
    """
    if digest := source.table.digest():
        return digest
    sha = hashlib.sha256()
    _update(sha, source, _file_state)
    return sha.hexdigest()


def _file_state(path: str) -> str:
    try:
        status = os.stat(to_path(path) if path else "")
    except OSError as error:
        raise UnreadableImage(printable(path), error.strerror or str(error)) from error
    return f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0"


def _update(sha: "hashlib._Hash", source: ImageSource, describe_file: Callable[[str], str]) -> bool:
    """Add each image to a hash: its bytes, or a text for the path of its file. Return whether any is a file."""
    has_files = False
    for cells in source.table.cells(256):
        for cell in cells.to_pylist():
            if cell and cell["bytes"] is not None:
                sha.update(hashlib.sha256(cell["bytes"]).digest())
            else:
                sha.update(describe_file((cell or {}).get("path") or "").encode())
                has_files = True
    return has_files


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
    bounds: list[str | None] = []
    for images in source.table.cells(4096):
        paths = images.field("path")
        bounds += compute.min_max(paths.filter(compute.not_equal(paths, "")) if skip_empty else paths).as_py().values()
    known = [bound for bound in bounds if bound is not None]
    return os.path.commonprefix(known).rfind("/") + 1  # noqa: RUF071 - cut at a slash
