"""A copy of a data set for disks and cores that cannot keep up: no image larger than views need, in few large files.

Shards are Arrow streams, which are mapped into memory and not read: rows are there at once, in any order, without a
second copy in a cache. Images lie in a shuffled order, so that reading shard by shard is random enough as well.
"""

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from sslkit.data.decode import Pixels, Size, UnreadableImage, decode_reduced
from sslkit.data.folder import printable
from sslkit.data.loader import start_worker
from sslkit.data.policies import ViewsConfig
from sslkit.data.source import ImageSource
from sslkit.durable import remove, replace_file, replace_text, sync, write_json
from sslkit.errors import RunError, UserError

FACTS = "prepared.json"
CHUNK = 64  # images that a worker hands over at a time, and that one record batch holds
PACKING = 4  # what a draw is for, the second word of its key; see `sslkit.data.replace`
FINE = 2.0  # times the wanted side that a JPEG decoded smaller still has, so that shrinking stays antialiased


@dataclass(frozen=True)
class Packing:
    """How to pack.

    Attributes:
        side: Shorter side in pixels to which larger images are shrunk; smaller ones are kept byte for byte.
        quality: Of the JPEG that a shrunk image becomes.
        seed: Of the order.
        shard_images: How many a shard holds.
    """

    side: int = 504
    quality: int = 95
    seed: int = 0
    shard_images: int = 2048


@dataclass(frozen=True)
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
    if folder.exists():
        raise UserError(f"{folder}: is there already; give a new folder, or remove it")
    try:
        return _pack(source, folder, packing, workers, progress)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}; the same command goes on") from error
    except RuntimeError as error:  # a DataLoader's
        raise RunError(f"a worker died: {str(error).splitlines()[0]}; the same command goes on") from error


def _pack(source: ImageSource, folder: Path, packing: Packing, workers: int, progress: Callable[[int], None]) -> Packed:
    part = folder.with_name(f".{folder.name}.part")
    _open_part(part, {**asdict(packing), "images": len(source), "names_sha256": source.names_digest()})
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
    facts = {"source": source.description, **asdict(packing), **asdict(packed)}
    write_json(part / FACTS, facts)
    for name in names:
        (part / f"{name}.json").unlink()
    os.rename(part, folder)
    sync(folder.parent)
    return packed


_STARTS: dict[str, Any] = {"images": 0, "shrunk": 0, "bytes_before": 0, "bytes_after": 0, "left_out": []}


def _open_part(part: Path, facts: dict[str, Any]) -> None:
    """A folder aside, with what an earlier call for the same thing has left there."""
    try:
        before = json.loads((part / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before != facts:
        remove(part)
        part.mkdir(parents=True)
        write_json(part / FACTS, facts)


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
    """An image of more than the wanted side as a JPEG of that side; empty where it is small enough.

    Raises:
        UnreadableImage: It cannot be decoded.
    """
    side = packing.side

    def reduction(size: Size) -> int:
        return next((by for by in (8, 4, 2) if min(size) / by >= FINE * side), 1)

    pixels, size = decode_reduced(encoded, name, reduction)
    if min(size) <= side:
        return b""
    stream = io.BytesIO()
    _resized(pixels, side).save(stream, "JPEG", quality=packing.quality, optimize=True)
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
) -> Iterator[list[_Row]]:
    """The rows of each shard, in order."""
    chunks = [shard[start : start + CHUNK].tolist() for shard in shards for start in range(0, len(shard), CHUNK)]
    loader: DataLoader[Any] = DataLoader(
        _Rows(source, packing),
        batch_sampler=chunks,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=start_worker,
    )
    batches = iter(loader)
    for shard in shards:
        rows: list[_Row] = []
        while len(rows) < len(shard):
            rows += next(batches)
            progress(min(CHUNK, len(rows)))
        yield rows


def _write_shard(source: ImageSource, path: Path, rows: list[_Row]) -> None:
    features = {"image": datasets.Image()}
    if label := source.label_column:
        features["label"] = source.table.features[label]
    schema = datasets.Features(features).arrow_schema
    good = [row for row in rows if row.encoded]
    root = f"{printable(source.root)}/" if source.root else ""

    def below(name: str) -> str:
        return name.removeprefix(root)

    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, schema) as writer:
        for start in range(0, len(good), CHUNK):
            chunk = good[start : start + CHUNK]
            cells: dict[str, list[Any]] = {"image": [{"bytes": row.encoded, "path": below(row.name)} for row in chunk]}
            if label:
                cells["label"] = list(source.table[[row.index for row in chunk]][label])
            writer.write_batch(pa.RecordBatch.from_pydict(cells, schema))
    replace_file(path.with_suffix(".arrow"), [memoryview(stream.getvalue())])
    counts = Packed(
        images=len(good),
        shrunk=sum(row.shrunk for row in good),
        bytes_before=sum(row.bytes_before for row in good),
        bytes_after=sum(len(row.encoded) for row in good),
        left_out=[{"name": below(row.name), "reason": row.reason} for row in rows if not row.encoded],
    )
    replace_text(path.with_suffix(".json"), json.dumps(asdict(counts)) + "\n")
