"""Read every image of a source and report what the images are and which are bad, before a run is started on them."""

import hashlib
import multiprocessing
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from sslkit.data.decode.background import describe_background
from sslkit.data.decode.channels import FULL_SCALE, as_picture
from sslkit.data.decode.rgb import TIFF, Header, Pixels, UnreadableImage, is_transparent, read_header
from sslkit.data.loading.loader import start_worker
from sslkit.data.loading.shared_memory import prefetch_of
from sslkit.data.loading.worker_status import StatusBoard
from sslkit.data.sources.image_source import ImageSource
from sslkit.data.tools.duplicates import difference_hash, exact_groups, near_groups
from sslkit.errors import RunError, UserError, first_line

CHUNK = 32  # images that a worker returns at a time
LISTED = 1000  # maximum length of a list of images or groups
TINY, HUGE, LONG = 32, 16_000_000, 8  # pixels of the shorter side; number of pixels; aspect ratio
MAX_COLOUR = 3  # levels between red, green and blue of a pixel that counts as grey
SAMPLED = 64  # images that `count_alpha` reads
QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)


@dataclass(frozen=True)
class _ImageStats:
    """Measurements of one image, or the reason why it is unreadable."""

    index: int  # position in the source
    reason: str = ""
    header: Header | None = None
    size: tuple[int, int, int] = (0, 0, 0)  # width, height, bytes of the encoded image
    properties: tuple[str, ...] = ()
    content: bytes = b""  # 16-byte hash of the encoded image
    perceptual_hash: int = 0
    mean: tuple[float, ...] = ()  # of each channel, for values in [0, 1]
    mean_square: tuple[float, ...] = ()


def _measure(source: ImageSource, index: int) -> _ImageStats:
    """Read image ``index`` as training does, and measure it."""
    try:
        name, encoded = source.encoded(index)
        pixels = source.read(index)
        header = _header(encoded, name, pixels)
    except UnreadableImage as error:
        return _ImageStats(index, error.reason)
    mean, std = channel_moments(pixels)
    colour = pixels.max(axis=2).astype(np.int32) - pixels.min(axis=2)
    properties = {
        "rotated": header.orientation != 1,
        "alpha": header.alpha,
        "transparent": header.alpha and is_transparent(encoded, name),
        "grey": bool((colour <= MAX_COLOUR).all()),
    }
    return _ImageStats(
        index,
        header=header,
        size=(pixels.shape[1], pixels.shape[0], len(encoded)),
        properties=tuple(each for each, found in properties.items() if found),
        content=hashlib.blake2b(encoded, digest_size=16).digest(),
        perceptual_hash=difference_hash(as_picture(pixels)),
        mean=tuple(mean.tolist()),
        mean_square=tuple((std**2 + mean**2).tolist()),
    )


def _header(encoded: bytes, name: str, pixels: Pixels) -> Header:
    """The metadata of an image. For a TIFF not of three channels, which Pillow may refuse, that of its pixels."""
    if encoded[:4] in TIFF and pixels.shape[2] != 3:
        return Header("TIFF", f"{pixels.shape[2]} channels", pixels.shape[1], pixels.shape[0], 1)
    return read_header(encoded, name)


def channel_moments(pixels: Pixels) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each channel of an image (H, W, C), for values in [0, 1]."""
    if pixels.dtype == np.uint8:
        mean, std = (np.asarray(values[:, 0] / 255.0, dtype=np.float64) for values in cv2.meanStdDev(pixels))
        return mean, std
    values = pixels.reshape(-1, pixels.shape[2])
    return values.mean(axis=0, dtype=np.float64) / FULL_SCALE, values.std(axis=0, dtype=np.float64) / FULL_SCALE


@dataclass
class _Totals:
    """Sums over images, and about forty bytes per image. Python 3.11 cannot subscript ``array`` at run time."""

    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    listed: list[tuple[int, str]] = field(default_factory=list)
    rows: "array[int]" = field(default_factory=lambda: array("Q"))  # position, width, height, bytes, hash of each
    contents: bytearray = field(default_factory=bytearray)
    mean: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    mean_square: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))

    def add(self, stats: _ImageStats) -> None:
        if stats.header is None:
            self.counts["unreadable"] += 1
            if len(self.listed) < LISTED:
                self.listed.append((stats.index, stats.reason))
            return
        self.formats[stats.header.format] += 1
        self.modes[stats.header.mode] += 1
        self.counts.update(stats.properties)
        self.rows.extend((stats.index, *stats.size, stats.perceptual_hash))
        self.contents += stats.content
        self.mean = self.mean + stats.mean
        self.mean_square = self.mean_square + stats.mean_square


def inspect_images(
    source: ImageSource, workers: int, progress: Callable[[int], None] = lambda count: None, timeout: float = 300.0
) -> dict[str, Any]:
    """Read and measure every image of a source: the report that docs/data.md describes.

    Lists hold the first 1000 entries; counts are complete. ``progress`` is called with the number of images that were
    read since its last call. Raises `UserError` if workers cannot be started, and `RunError`, which names the images
    that were being read, if a worker dies or needs more than ``timeout`` seconds for `CHUNK` images.
    """
    totals, status = _Totals(), StatusBoard(workers)
    loader: DataLoader[Any] = DataLoader(
        _Stats(source.without_labels(), status),
        CHUNK,
        num_workers=workers,
        collate_fn=list,
        timeout=timeout if workers else 0.0,
        worker_init_fn=start_worker,
        prefetch_factor=prefetch_of(0, workers, "--workers", 2),
    )
    try:
        for batch in loader:
            for stats in batch:
                totals.add(stats)
            progress(len(batch))
    except RuntimeError as error:
        names = [source.name(each.sample) for each in status.read() if each.sample is not None]
        for worker in multiprocessing.active_children():
            worker.kill()
        raise RunError(f"a worker died or hung ({first_line(error)}) at one of: {'; '.join(names)}") from error
    return _report(source, totals)


class _Stats(Dataset[_ImageStats]):
    def __init__(self, source: ImageSource, status: StatusBoard) -> None:
        self.source, self.status = source, status

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> _ImageStats:
        self.status.write(index)
        stats = _measure(self.source, index)
        self.status.write()
        return stats


def _report(source: ImageSource, totals: _Totals) -> dict[str, Any]:
    rows, counts = np.frombuffer(totals.rows, np.uint64).reshape(-1, 5), totals.counts
    readable, positions = len(rows), rows[:, 0].astype(np.int64)
    report: dict[str, Any] = {"data": source.description, "images": len(source), "readable": readable}
    listed = [{"index": index, "name": source.name(index), "reason": reason} for index, reason in totals.listed]
    report["unreadable"] = {"count": counts["unreadable"], "images": listed}
    report["classes"], report["label_problem"] = _class_counts(source)
    if not readable:
        return report
    mean, digits = totals.mean / readable, 4 if source.channels is None else 6  # 16-bit images may be very dark
    alpha = {"count": counts["alpha"], "transparent": counts["transparent"], "background": source.background}
    return {
        **report,
        "formats": dict(totals.formats.most_common()),
        "modes": dict(totals.modes.most_common()),
        "exif_rotated": counts["rotated"],
        **({"alpha": alpha} if source.channels is None else {}),  # other channels keep alpha
        "grey_share": counts["grey"] / readable,
        "mean": mean.round(digits).tolist(),
        "std": np.sqrt(np.maximum(totals.mean_square / readable - mean**2, 0)).round(digits).tolist(),
        **_sizes(source, positions, rows[:, 1:4].astype(np.int64)),
        **_duplicates(source, positions, np.frombuffer(totals.contents, np.dtype("V16")), rows[:, 4]),
    }


def count_alpha(source: ImageSource) -> tuple[int, int]:
    """Number of images with alpha in a random sample, and the number of readable images in the sample."""
    found = readable = 0
    for index in np.sort(source.sample(SAMPLED, 0)).tolist():
        try:
            name, encoded = source.encoded(index)
            found += read_header(encoded, name).alpha
        except UnreadableImage:
            continue
        readable += 1
    return found, readable


def describe_alpha(source: ImageSource) -> str:
    """How many images of a sample have alpha, and what is done with it, for messages."""
    found, readable = count_alpha(source)
    action = f": {describe_background(source.background)}" if found else ""
    return f"alpha channel in {found} of the {readable} images looked at{action}"


def _sizes(source: ImageSource, positions: NDArray[np.int64], sizes: NDArray[np.int64]) -> dict[str, Any]:
    width, height, num_bytes = sizes.T
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    unusual = {"tiny": shorter < TINY, "huge": width * height > HUGE, "long": longer > LONG * shorter}
    quantities = {"width": width, "height": height, "shorter_side": shorter, "bytes": num_bytes}
    quantiles = {
        name: {f"{share:g}": int(value) for share, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}
        for name, values in quantities.items()
    }
    listed = {
        name: {
            "count": int(which.sum()),
            "images": [
                {"name": source.name(int(positions[row])), "width": int(width[row]), "height": int(height[row])}
                for row in np.flatnonzero(which)[:LISTED]
            ],
        }
        for name, which in unusual.items()
    }
    return {"quantiles": quantiles, **listed}


def _duplicates(
    source: ImageSource, positions: NDArray[np.int64], contents: NDArray[np.void], hashes: NDArray[np.uint64]
) -> dict[str, Any]:
    exact = exact_groups(contents)
    copies = np.zeros(len(positions), dtype=bool)
    for group in exact:
        copies[group[1:]] = True
    originals = np.flatnonzero(~copies)
    near = [originals[group] for group in near_groups(hashes[originals])]
    return {
        name: {
            "groups": len(groups),
            "surplus": sum(len(group) - 1 for group in groups),
            "images": [[source.name(int(positions[row])) for row in group] for group in groups[:LISTED]],
        }
        for name, groups in (("exact_duplicates", exact), ("near_duplicates", near))
    }


def _class_counts(source: ImageSource) -> tuple[dict[str, int] | None, str]:
    """Images per class, or None without labels; and what is wrong with the labels."""
    if source.label_column is None and not source.unlabelled:
        return None, ""
    try:
        return dict(sorted(Counter(source.labels()).items())), ""
    except UserError as error:
        return None, str(error) if source.label_column else ""
