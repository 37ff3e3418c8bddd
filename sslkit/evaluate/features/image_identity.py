"""What images are, wherever they lie: digests that a moved or copied set keeps and another set does not have."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.formats.folder_listing import to_path
from sslkit.data.sources.image_source import ImageSource
from sslkit.evaluate.detection.annotated_image import Picture

SAMPLED = 256  # files whose content is looked at too; of all others the size must do


def images_digest(source: ImageSource) -> str:
    """Sixteen hexadecimal digits of which images a source holds, in which order.

    Images that the data holds count by their bytes. Files count by their names below the folder that holds them all,
    by their sizes, and a spread sample of them by their bytes: a second for every 100 000 or so. One that cannot be
    read counts as such.
    """
    if digest := source.table.digest():
        return digest[:16]
    paths = source.paths()
    named = [path for path in paths if path]
    root = os.path.commonprefix([min(named), max(named)]).rfind("/") + 1 if named else 0  # noqa: RUF071 - cut at a slash
    sha = hashlib.sha256(str(len(source)).encode())
    num_files = 0
    for cells in source.table.cells(256):
        for cell in cells.to_pylist():
            if cell and cell["bytes"] is not None:
                sha.update(hashlib.sha256(cell["bytes"]).digest())
            else:
                path = (cell or {}).get("path") or ""
                sha.update(f"{path[root:]}\0{_size(path)}\0".encode())
                num_files += 1
    if num_files:
        for index in _spread(len(source)):
            sha.update(_content_of(partial(_encoded, source, index)))
    return sha.hexdigest()[:16]


def pictures_digest(pictures: Sequence[Picture]) -> str:
    """Sixteen hexadecimal digits of annotated pictures: names, sizes, boxes, and a sample's bytes."""
    digest = hashlib.sha256(str(len(pictures)).encode())
    for picture in pictures:
        size = _size(str(picture.file))
        digest.update(f"{picture.file.name}\0{size}\0{picture.width}\0{picture.height}\0".encode())
        for numbers in (picture.boxes, picture.labels, picture.ignored):
            digest.update(numbers.tobytes())
    for index in _spread(len(pictures)):
        digest.update(_content_of(pictures[index].file.read_bytes))
    return digest.hexdigest()[:16]


def _spread(count: int) -> Iterable[int]:
    return [int(index) for index in np.unique(np.linspace(0, count - 1, min(count, SAMPLED), dtype=np.int64))]


def _size(path: str) -> int:
    try:
        return os.stat(to_path(path)).st_size if path else -1
    except OSError:
        return -1


def _encoded(source: ImageSource, index: int) -> bytes:
    return source.encoded(index)[1]


def _content_of(read: Callable[[], bytes]) -> bytes:
    try:
        return hashlib.sha256(read()).digest()
    except (OSError, UnreadableImage):
        return b"unreadable"
