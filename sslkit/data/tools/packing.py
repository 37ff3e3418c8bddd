"""Pack a data set into a few large files, with no image larger than the views need, for slow disks or few cores.

Shards are Arrow streams, mapped into memory, in random order, so that reading shard by shard is random as well.
"""

import fcntl
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from sslkit.data.augment.views_config import ViewsConfig
from sslkit.data.decode.background import WHITE
from sslkit.data.decode.rgb import Size, UnreadableImage, decode_reduced
from sslkit.data.formats.folder_listing import printable
from sslkit.data.loading.loader import start_worker
from sslkit.data.loading.shared_memory import prefetch_of
from sslkit.data.sources.image_identity import names_digest
from sslkit.data.sources.image_source import ImageSource
from sslkit.errors import RunError, UserError, check_path, first_line
from sslkit.files.atomic import remove, replace_file, replace_text, sync, write_json
from sslkit.random_draws import DrawPurpose

SUMMARY, JOB = "prepared.json", "job.json"
CHUNK = 16  # images that a worker returns at a time
BATCH_ROWS, BATCH_BYTES = 64, 2**26  # maximum size of a record batch of several images
KEPT_BYTES = 2**25  # small images with larger files are encoded again, without loss
LONGEST = 65_500  # pixels of the longer side of a JPEG
OVERSAMPLING = 2.0  # of a JPEG that is decoded at reduced size, so that resizing it stays antialiased


@dataclass(frozen=True)
class Packing:
    """Options of `pack`."""

    side: int = 504  # shorter side in pixels to which larger images are resized; smaller ones are kept byte for byte
    quality: int = 95  # JPEG quality of resized images
    seed: int = 0  # of the order
    shard_images: int = 2048
    background: str = WHITE  # for transparent pixels of resized images; other images keep their alpha


@dataclass
class Packed:
    """The result of `pack`, for a data set or a shard."""

    images: int = 0  # number of packed images
    shrunk: int = 0  # number of them that were resized
    bytes_before: int = 0  # of the packed images
    bytes_after: int = 0
    left_out: list[dict[str, str]] = field(default_factory=list)  # name and reason of each unreadable image


def sufficient_side(views: ViewsConfig) -> int:
    """Shorter side, a multiple of 8, of square images whose smallest crops have as many pixels as their views."""
    sides = [policy.size / math.sqrt(policy.crop_scale[0]) for policy in views.view_policies()]
    return math.ceil(max(sides) / 8) * 8


def pack(
    source: ImageSource,
    folder: Path,
    packing: Packing,
    workers: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> Packed:
    """Write ``source`` to a new folder of shards. The same call continues an interrupted one, shard by shard.

    Unreadable images are left out and listed in ``prepared.json``. Labels and names of classes are kept. ``progress``
    is called with the number of images that are done since its last call. Raises `UserError` if ``folder`` exists or
    cannot be written, or no image is readable, and `RunError` if a worker dies.
    """
    check_path(folder, "OUTPUT")
    if os.path.lexists(folder):
        raise UserError(f"{folder}: exists already; give a new folder, or remove it")
    read_from = source.within or source.root
    if read_from and folder.resolve().is_relative_to(Path(read_from).resolve()):
        raise UserError(f"{folder}: is inside the folder to pack; give a folder outside it")
    try:
        with _exclusive_lock(folder.with_name(f".{folder.name}.lock")):
            return _pack(source, folder, packing, workers, progress)
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}"
        raise UserError(f"{folder}: {reason}; the same command continues") from error
    except RuntimeError as error:  # from DataLoader
        raise RunError(f"a worker died: {first_line(error)}; the same command continues") from error


def _pack(source: ImageSource, folder: Path, packing: Packing, workers: int, progress: Callable[[int], None]) -> Packed:
    part = folder.with_name(f".{folder.name}.part")
    _open_part(part, {**asdict(packing), "images": len(source), "names_sha256": names_digest(source)})
    order = np.random.default_rng([packing.seed, DrawPurpose.PACKING, 0, 0, 0]).permutation(len(source))
    size = packing.shard_images
    names = [f"shard-{number:05d}" for number in range(math.ceil(len(order) / size))]
    missing = [number for number, name in enumerate(names) if not (part / f"{name}.json").is_file()]
    todo = [order[number * size : (number + 1) * size] for number in missing]
    progress(len(order) - sum(map(len, todo)))
    rows = _rows_of(source, packing, todo, workers, progress)
    for number, shard in zip(missing, todo, strict=True):
        _write_shard(source, part / names[number], islice(rows, len(shard)))
    results = [json.loads((part / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    packed = Packed(**{key: sum((each[key] for each in results), zero) for key, zero in asdict(Packed()).items()})
    if not packed.images:
        raise UserError(f"{source.description}: none of its images can be read; {packed.left_out[0]['reason']}")
    write_json(part / SUMMARY, {"source": source.description, **asdict(packing), **asdict(packed)})
    os.rename(part, folder)
    sync(folder.parent)
    for name in (JOB, *(f"{name}.json" for name in names)):  # last, as continuing an interrupted call needs them
        (folder / name).unlink()
    return packed


@contextmanager
def _exclusive_lock(lock: Path) -> Iterator[None]:
    """Hold a lock that is released when the process ends."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{lock.parent}: another process is packing there; wait until it has finished") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _open_part(part: Path, job: dict[str, Any]) -> None:
    """Create the temporary folder, or keep that of an interrupted call with the same ``job``."""
    try:
        before = json.loads((part / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before != job:
        remove(part)
        part.mkdir(parents=True)
        write_json(part / JOB, job)


@dataclass(frozen=True)
class _Row:
    """A packed image, or, without bytes, the reason why it is left out."""

    index: int
    name: str
    encoded: bytes
    bytes_before: int
    shrunk: bool
    reason: str = ""


class _Rows(Dataset[_Row]):
    def __init__(self, source: ImageSource, packing: Packing) -> None:
        self.source, self.packing = source.without_labels(), packing

    def __getitem__(self, index: int) -> _Row:
        try:
            name, encoded = self.source.encoded(index)
            smaller = shrink(encoded, name, self.packing)
        except UnreadableImage as error:
            return _Row(index, self.source.name(index), b"", 0, shrunk=False, reason=error.reason)
        return _Row(index, name, smaller or encoded, len(encoded), shrunk=bool(smaller))


def shrink(encoded: bytes, name: str, packing: Packing) -> bytes:
    """Resize an image larger than `Packing.side`, to a JPEG; empty bytes if it is kept. Raises `UnreadableImage`."""
    side = packing.side

    def reduction(size: Size) -> int:
        return next((by for by in (8, 4, 2) if min(size) / by >= OVERSAMPLING * side), 1)

    pixels, size = decode_reduced(encoded, name, reduction, packing.background)
    image, stream = Image.fromarray(pixels), io.BytesIO()
    if min(size) > side and max(size) * side / min(size) < LONGEST:
        scale = side / min(image.size)
        resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        resized.save(stream, "JPEG", quality=packing.quality, optimize=True)
    elif len(encoded) > KEPT_BYTES:
        image.save(stream, "PNG")
    return stream.getvalue()


def _rows_of(
    source: ImageSource,
    packing: Packing,
    shards: Sequence[NDArray[np.int64]],
    workers: int,
    progress: Callable[[int], None],
) -> Iterator[_Row]:
    """The rows of all shards, in order."""
    chunks = [shard[start : start + CHUNK].tolist() for shard in shards for start in range(0, len(shard), CHUNK)]
    loader: DataLoader[Any] = DataLoader(
        _Rows(source, packing),
        batch_sampler=chunks,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=start_worker,
        prefetch_factor=prefetch_of(0, workers, "--workers", 2),
    )
    for rows in loader:
        progress(len(rows))
        yield from rows


def _write_shard(source: ImageSource, path: Path, rows: Iterator[_Row]) -> None:
    """Write a shard and, beside it, its `Packed`."""
    packed = Packed()
    replace_file(path.with_suffix(".arrow"), _stream(source, rows, packed))
    replace_text(path.with_suffix(".json"), json.dumps(asdict(packed)) + "\n")


def _stream(source: ImageSource, rows: Iterator[_Row], packed: Packed) -> Iterator[bytes]:
    """An Arrow stream, one record batch at a time; updates ``packed``."""
    features = {"image": datasets.Image()}
    if source.label_column:
        features["label"] = source.table.label_feature
    schema = datasets.Features(features).arrow_schema
    root = f"{printable(source.root)}/" if source.root else ""
    sink = io.BytesIO()
    with pa.ipc.new_stream(pa.PythonFile(sink, "w"), schema) as writer:
        for batch in _batches(rows, root, packed):
            images = [{"bytes": row.encoded, "path": row.name.removeprefix(root)} for row in batch]
            cells: dict[str, list[Any]] = {"image": images}
            if source.label_column:
                cells["label"] = source.table.labels([row.index for row in batch])
            writer.write_batch(pa.RecordBatch.from_pydict(cells, schema))
            yield _take(sink)
    yield _take(sink)


def _take(sink: io.BytesIO) -> bytes:
    """Empty ``sink``; returns what was in it."""
    content = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return content


def _batches(rows: Iterator[_Row], root: str, packed: Packed) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    for row in rows:
        if not row.encoded:
            packed.left_out.append({"name": row.name.removeprefix(root), "reason": row.reason})
            continue
        packed.images += 1
        packed.shrunk += row.shrunk
        packed.bytes_before += row.bytes_before
        packed.bytes_after += len(row.encoded)
        batch.append(row)
        if sum(len(each.encoded) for each in batch) >= BATCH_BYTES or len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
