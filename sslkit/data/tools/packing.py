"""A copy of a data set for disks and cores that cannot keep up: no image larger than views need, in few large files.

Shards are Arrow streams, which are mapped into memory and not read: rows are there at once, in any order, without a
second copy in a cache. Images lie in a shuffled order, so that reading shard by shard is random enough as well.
"""

import fcntl
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from sslkit.data.augment.policies import ViewsConfig
from sslkit.data.decode.background import WHITE
from sslkit.data.decode.rgb import Pixels, Size, UnreadableImage, decode_reduced
from sslkit.data.formats.folder_listing import printable
from sslkit.data.loading.loader import start_worker
from sslkit.data.loading.shared_memory import prefetch_of
from sslkit.data.sources.image_identity import names_digest
from sslkit.data.sources.image_source import ImageSource
from sslkit.errors import RunError, UserError, check_path
from sslkit.files.atomic import remove, replace_file, replace_text, sync, write_json

FACTS, JOB = "prepared.json", "job.json"
CHUNK = 16  # images that a worker hands over at a time
BATCH_ROWS, BATCH_BYTES = 64, 2**26  # of images that one record batch holds, if it is not a single one
KEPT_BYTES = 2**25  # of a small image that is kept as it is; a file beyond that is packed anew, without loss
LONGEST = 65_500  # pixels of a JPEG's side
PACKING = 4  # what a draw is for, the second word of its key; see `sslkit.data.loading.replacement`
FINE = 2.0  # times the wanted side that a JPEG decoded smaller still has, so that shrinking stays antialiased


@dataclass(frozen=True)
class Packing:
    """How to pack.

    Attributes:
        side: Shorter side in pixels to which larger images are shrunk; smaller ones are kept byte for byte.
        quality: Of the JPEG that a shrunk image becomes.
        seed: Of the order.
        shard_images: How many a shard holds.
        background: What transparent pixels of an image that is shrunk are composited over; one that is kept keeps its
            alpha.
    """

    side: int = 504
    quality: int = 95
    seed: int = 0
    shard_images: int = 2048
    background: str = WHITE


@dataclass
class Packed:
    """What became of a data set: images packed, those of them shrunk, bytes before and after, and who was left out."""

    images: int
    shrunk: int
    bytes_before: int
    bytes_after: int
    left_out: list[dict[str, str]]


def sufficient_side(views: ViewsConfig) -> int:
    """Shorter side of a square image whose smallest crop still has as many pixels as its view: a multiple of 8."""
    sides = [views.size / math.sqrt(views.crop_scale[0])]
    sides += [views.small_size / math.sqrt(views.small_scale[0])] if views.small_crops else []
    return math.ceil(max(sides) / 8) * 8


def pack(
    source: ImageSource,
    folder: Path,
    packing: Packing,
    workers: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> Packed:
    """Write ``source`` into a new folder of shards; an interrupted call is continued by the same one, shard by shard.

    Images that cannot be read are left out and listed in ``prepared.json``. Labels and their names are kept.

    Args:
        source: Images and, if any, labels.
        folder: Must not exist; appears when all is there.
        packing: How.
        workers: Processes that decode and encode; 0 does it in this one.
        progress: Told, again and again, how many more images are done.

    Raises:
        UserError: ``folder`` exists, or cannot be written.
        RunError: A worker died.
    """
    check_path(folder, "OUTPUT")
    if os.path.lexists(folder):
        raise UserError(f"{folder}: is there already; give a new folder, or remove it")
    read_from = source.within or source.root
    if read_from and folder.resolve().is_relative_to(Path(read_from).resolve()):
        raise UserError(f"{folder}: lies in the folder that is packed; give one elsewhere")
    try:
        with _alone(folder.with_name(f".{folder.name}.lock")):
            return _pack(source, folder, packing, workers, progress)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}; the same command goes on") from error
    except RuntimeError as error:  # a DataLoader's
        raise RunError(f"a worker died: {str(error).splitlines()[0]}; the same command goes on") from error


def _pack(source: ImageSource, folder: Path, packing: Packing, workers: int, progress: Callable[[int], None]) -> Packed:
    part = folder.with_name(f".{folder.name}.part")
    _open_part(part, {**asdict(packing), "images": len(source), "names_sha256": names_digest(source)})
    order = np.random.default_rng([packing.seed, PACKING, 0, 0, 0]).permutation(len(source))
    size = packing.shard_images
    names = [f"shard-{number:05d}" for number in range(math.ceil(len(order) / size))]
    missing = [number for number, name in enumerate(names) if not (part / f"{name}.json").is_file()]
    progress(len(order) - sum(len(order[number * size : (number + 1) * size]) for number in missing))
    todo = [order[number * size : (number + 1) * size] for number in missing]
    for number, rows in zip(missing, _rows_of(source, packing, todo, workers, progress), strict=True):
        _write_shard(source, part / names[number], rows)
    counts = [json.loads((part / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    packed = Packed(*(sum((each[key] for each in counts), start) for key, start in _STARTS.items()))
    if not packed.images:
        raise UserError(f"{source.description}: none of its images can be read; {packed.left_out[0]['reason']}")
    write_json(part / FACTS, {"source": source.description, **asdict(packing), **asdict(packed)})
    os.rename(part, folder)
    sync(folder.parent)
    for name in (JOB, *(f"{name}.json" for name in names)):  # only now: whoever is killed before finds all he needs
        (folder / name).unlink()
    return packed


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock, which goes with the process."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{lock.parent}: another process is packing there; wait for it") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


_STARTS: dict[str, Any] = {"images": 0, "shrunk": 0, "bytes_before": 0, "bytes_after": 0, "left_out": []}


def _open_part(part: Path, facts: dict[str, Any]) -> None:
    """A folder aside, with what an earlier call for the same thing has left there."""
    try:
        before = json.loads((part / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before != facts:
        remove(part)
        part.mkdir(parents=True)
        write_json(part / JOB, facts)


@dataclass(frozen=True)
class _Row:
    """An image as it is packed, or, without bytes, why it is not."""

    index: int
    name: str
    encoded: bytes
    bytes_before: int
    shrunk: bool
    reason: str = ""


class _Rows(Dataset[_Row]):
    def __init__(self, source: ImageSource, packing: Packing) -> None:
        self.source, self.packing = source.without_labels(), packing

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> _Row:
        try:
            name, encoded = self.source.encoded(index)
            smaller = shrink(encoded, name, self.packing)
        except UnreadableImage as error:
            return _Row(index, self.source.name(index), b"", 0, shrunk=False, reason=error.reason)
        return _Row(index, name, smaller or encoded, len(encoded), shrunk=bool(smaller))


def shrink(encoded: bytes, name: str, packing: Packing) -> bytes:
    """An image of more than the wanted side as a JPEG of that side; empty where it can stay as it is.

    Raises:
        UnreadableImage: It cannot be decoded.
    """
    side = packing.side

    def reduction(size: Size) -> int:
        return next((by for by in (8, 4, 2) if min(size) / by >= FINE * side), 1)

    pixels, size = decode_reduced(encoded, name, reduction, packing.background)
    stream = io.BytesIO()
    if min(size) > side and max(size) * side / min(size) < LONGEST:
        _resized(pixels, side).save(stream, "JPEG", quality=packing.quality, optimize=True)
    elif len(encoded) > KEPT_BYTES:
        Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _resized(pixels: Pixels, side: int) -> Image.Image:
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    return Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)


def _rows_of(
    source: ImageSource,
    packing: Packing,
    shards: Sequence[NDArray[np.int64]],
    workers: int,
    progress: Callable[[int], None],
) -> Iterator[Iterator[_Row]]:
    """The rows of each shard, in order; each must be read to its end before the next is asked for."""
    chunks = [shard[start : start + CHUNK].tolist() for shard in shards for start in range(0, len(shard), CHUNK)]
    loader: DataLoader[Any] = DataLoader(
        _Rows(source, packing),
        batch_sampler=chunks,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=start_worker,
        prefetch_factor=prefetch_of(0, workers, "--workers", 2),
    )
    batches = iter(loader)

    def rows_of(count: int) -> Iterator[_Row]:
        for _ in range(math.ceil(count / CHUNK)):
            rows = next(batches)
            progress(len(rows))
            yield from rows

    return (rows_of(len(shard)) for shard in shards)


def _write_shard(source: ImageSource, path: Path, rows: Iterator[_Row]) -> None:
    """Write a shard as its rows come, and what became of them beside it."""
    tally = Packed(0, 0, 0, 0, [])
    replace_file(path.with_suffix(".arrow"), _stream(source, rows, tally))
    replace_text(path.with_suffix(".json"), json.dumps(asdict(tally)) + "\n")


def _stream(source: ImageSource, rows: Iterator[_Row], tally: Packed) -> Iterator[bytes]:
    """An Arrow stream, a record batch at a time; ``tally`` is brought up to date on the way."""
    features = {"image": datasets.Image()}
    if label := source.label_column:
        features["label"] = source.table.features[label]
    schema = datasets.Features(features).arrow_schema
    root = f"{printable(source.root)}/" if source.root else ""
    sink = _Sink()
    with pa.ipc.new_stream(pa.PythonFile(sink, "w"), schema) as writer:
        for batch in _batches(rows, root, tally):
            cells: dict[str, list[Any]] = {
                "image": [{"bytes": row.encoded, "path": row.name.removeprefix(root)} for row in batch]
            }
            if label:
                cells["label"] = list(source.table[[row.index for row in batch]][label])
            writer.write_batch(pa.RecordBatch.from_pydict(cells, schema))
            yield sink.take()
    yield sink.take()


def _batches(rows: Iterator[_Row], root: str, tally: Packed) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    for row in rows:
        if not row.encoded:
            tally.left_out.append({"name": row.name.removeprefix(root), "reason": row.reason})
            continue
        tally.images += 1
        tally.shrunk += row.shrunk
        tally.bytes_before += row.bytes_before
        tally.bytes_after += len(row.encoded)
        batch.append(row)
        if sum(len(each.encoded) for each in batch) >= BATCH_BYTES or len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


class _Sink(io.RawIOBase):
    """Takes what is written, and gives it away."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        self.pieces.append(bytes(piece))
        return len(piece)

    def take(self) -> bytes:
        taken, self.pieces = b"".join(self.pieces), []
        return taken
