"""A look at every image of a source before hours are spent on it: what it is, and what is wrong with it."""

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
from sslkit.data.loading.shared_memory import prefetch_of
from sslkit.data.loading.worker_status import Posts
from sslkit.data.sources.image_source import ImageSource
from sslkit.data.tools.duplicates import difference_hash, exact_groups, near_groups
from sslkit.errors import RunError, UserError

CHUNK = 32  # images that a worker hands over at a time
LISTED = 1000  # names in a list, groups in a list of groups; counts are of all
TINY, HUGE, LONG = 32, 16_000_000, 8  # pixels of the shorter side, pixels in all, longer side over shorter
COLOURLESS = 3  # levels between red, green and blue, up to which a pixel is grey
LOOKED_AT = 64  # images, to see whether any have alpha
QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)


@dataclass(frozen=True)
class Sight:
    """What was seen of one image; of an unreadable one, only ``index`` and ``reason``."""

    index: int
    reason: str = ""
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    orientation: int = 1
    alpha: bool = False
    transparent: bool = False
    num_bytes: int = 0
    content: bytes = b""
    likeness: int = 0
    grey: bool = False
    mean: tuple[float, ...] = ()
    square: tuple[float, ...] = ()


def look(source: ImageSource, index: int) -> Sight:
    """Read image ``index`` as training would, and measure it."""
    try:
        name, encoded = source.encoded(index)
        pixels = source.read(index)
        header = _header(encoded, name, pixels)
    except UnreadableImage as error:
        return Sight(index, error.reason)
    height, width = pixels.shape[:2]
    means, deviations = _moments(pixels)
    spread = pixels.max(axis=2).astype(np.int32) - pixels.min(axis=2)
    return Sight(
        index,
        "",
        header.format,
        header.mode,
        width,
        height,
        header.orientation,
        header.alpha,
        header.alpha and is_transparent(encoded, name),
        len(encoded),
        hashlib.blake2b(encoded, digest_size=16).digest(),
        difference_hash(as_picture(pixels)),
        bool((spread <= COLOURLESS).all()),
        tuple(means.tolist()),
        tuple((deviations**2 + means**2).tolist()),
    )


def _header(encoded: bytes, name: str, pixels: Pixels) -> Header:
    """What an image says of itself; of a TIFF of several channels, which Pillow cannot open, what was read of it."""
    if encoded[:4] in TIFF and pixels.shape[2] != 3:
        return Header("TIFF", f"{pixels.shape[2]} channels", pixels.shape[1], pixels.shape[0], 1)
    return read_header(encoded, name)


def _moments(pixels: Pixels) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each channel, for values in [0, 1]."""
    if pixels.dtype == np.uint8:
        means, deviations = (np.asarray(values[:, 0] / 255.0, dtype=np.float64) for values in cv2.meanStdDev(pixels))
        return means, deviations
    values = pixels.reshape(-1, pixels.shape[2])
    return values.mean(axis=0, dtype=np.float64) / FULL_SCALE, values.std(axis=0, dtype=np.float64) / FULL_SCALE


@dataclass
class _Tally:
    """The sum of what was seen, some forty bytes an image. Python 3.11 cannot subscript ``array`` when it runs."""

    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    orientations: Counter[int] = field(default_factory=Counter)
    alpha: int = 0
    transparent: int = 0
    grey: int = 0
    bad: int = 0
    unreadable: list[tuple[int, str]] = field(default_factory=list)
    positions: "array[int]" = field(default_factory=lambda: array("Q"))
    sizes: "array[int]" = field(default_factory=lambda: array("Q"))
    likenesses: "array[int]" = field(default_factory=lambda: array("Q"))
    contents: bytearray = field(default_factory=bytearray)
    mean: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    square: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))

    def add(self, sight: Sight) -> None:
        if sight.reason:
            self.bad += 1
            if self.bad <= LISTED:
                self.unreadable.append((sight.index, sight.reason))
            return
        self.formats[sight.format] += 1
        self.modes[sight.mode] += 1
        if sight.orientation != 1:
            self.orientations[sight.orientation] += 1
        self.alpha += sight.alpha
        self.transparent += sight.transparent
        self.grey += sight.grey
        self.positions.append(sight.index)
        self.sizes.extend((sight.width, sight.height, sight.num_bytes))
        self.likenesses.append(sight.likeness)
        self.contents += sight.content
        self.mean = self.mean + sight.mean
        self.square = self.square + sight.square


def survey(
    source: ImageSource, workers: int, progress: Callable[[int], None] = lambda count: None, timeout: float = 300.0
) -> dict[str, Any]:
    """Look at every image of a source, in memory that grows by some forty bytes an image.

    Args:
        source: Images and, if any, labels.
        workers: Processes that read; 0 reads in this one.
        progress: Told, again and again, how many more images have been looked at.
        timeout: Seconds that a chunk may take.

    Returns:
        Plain data by the names in docs/data.md. A list holds the first 1000; its count is of all.

    Raises:
        UserError: Workers cannot be started; see `prefetch_of`.
        RunError: A worker died or hung; the sentence names the images that were being read.
    """
    prefetch = prefetch_of(0, workers, "--workers", 2)
    tally, posts = _Tally(), Posts(workers)
    loader: DataLoader[Any] = DataLoader(
        _Sights(source.without_labels(), posts),
        CHUNK,
        num_workers=workers,
        collate_fn=list,
        timeout=timeout if workers else 0.0,
        worker_init_fn=_start_worker,
        prefetch_factor=prefetch,
    )
    try:
        for sights in loader:
            for sight in sights:
                tally.add(sight)
            progress(len(sights))
    except RuntimeError as error:
        at = [source.name(post.sample) for post in posts.read() if post.sample is not None]
        for worker in multiprocessing.active_children():
            worker.kill()
        raise RunError(f"a worker died or hung ({str(error).splitlines()[0]}) at one of: {'; '.join(at)}") from error
    return _findings(source, tally)


class _Sights(Dataset[Sight]):
    def __init__(self, source: ImageSource, posts: Posts) -> None:
        self.source, self.posts = source, posts

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sight:
        self.posts.begin(index)
        sight = look(self.source, index)
        self.posts.end()
        return sight


def _start_worker(_worker: int) -> None:
    cv2.setNumThreads(0)


def _findings(source: ImageSource, tally: _Tally) -> dict[str, Any]:
    positions = np.frombuffer(tally.positions, np.uint64).astype(np.int64)
    good = len(positions)
    found: dict[str, Any] = {"data": source.description, "images": len(source), "readable": good}
    found["unreadable"] = {
        "count": tally.bad,
        "images": [
            {"index": index, "name": source.name(index), "reason": reason} for index, reason in tally.unreadable
        ],
    }
    found["classes"], found["label_problem"] = _class_counts(source)
    if not good:
        return found
    mean, digits = tally.mean / good, 4 if source.channels is None else 6  # 16 bits may use little of their scale
    return {
        **found,
        "formats": dict(tally.formats.most_common()),
        "modes": dict(tally.modes.most_common()),
        "exif_rotated": tally.orientations.total(),
        **_alpha(source, tally),
        "grey_share": tally.grey / good,
        "mean": mean.round(digits).tolist(),
        "std": np.sqrt(np.maximum(tally.square / good - mean**2, 0)).round(digits).tolist(),
        **_sizes(source, positions, np.frombuffer(tally.sizes, np.uint64).reshape(-1, 3).astype(np.int64)),
        **_duplicates(source, positions, tally),
    }


def _alpha(source: ImageSource, tally: _Tally) -> dict[str, Any]:
    """How many images have alpha and what is done with it; nothing of images of channels, which keep it."""
    if source.channels is not None:
        return {}
    return {"alpha": {"count": tally.alpha, "transparent": tally.transparent, "background": source.background}}


def count_alpha(source: ImageSource, at_most: int = LOOKED_AT) -> tuple[int, int]:
    """How many images have alpha, of how many looked at: a draw of at most so many, without those unreadable."""
    found = looked_at = 0
    for index in np.sort(source.draw(at_most, 0)).tolist():
        try:
            name, encoded = source.encoded(index)
            found += read_header(encoded, name).alpha
        except UnreadableImage:
            continue
        looked_at += 1
    return found, looked_at


def describe_alpha(source: ImageSource) -> str:
    """How many of a few images have alpha, and what is done with it, in words for print."""
    found, looked_at = count_alpha(source)
    done = f": {describe_background(source.background)}" if found else ""
    return f"alpha channel in {found} of the {looked_at} images looked at{done}"


def _sizes(source: ImageSource, positions: NDArray[np.int64], sizes: NDArray[np.int64]) -> dict[str, Any]:
    width, height, num_bytes = sizes.T
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    odd = {"tiny": shorter < TINY, "huge": width * height > HUGE, "long": longer > LONG * shorter}
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
        for name, which in odd.items()
    }
    return {"quantiles": quantiles, **listed}


def _duplicates(source: ImageSource, positions: NDArray[np.int64], tally: _Tally) -> dict[str, Any]:
    exact = exact_groups(np.frombuffer(bytes(tally.contents), np.dtype("V16")))
    copies = np.zeros(len(positions), dtype=bool)
    for group in exact:
        copies[group[1:]] = True
    originals = np.flatnonzero(~copies)
    near = [originals[group] for group in near_groups(np.frombuffer(tally.likenesses, np.uint64)[originals])]
    return {
        name: {
            "groups": len(groups),
            "surplus": sum(len(group) - 1 for group in groups),
            "images": [[source.name(int(positions[row])) for row in group] for group in groups[:LISTED]],
        }
        for name, groups in (("exact_duplicates", exact), ("near_duplicates", near))
    }


def _class_counts(source: ImageSource) -> tuple[dict[str, int] | None, str]:
    """Images of each class, or None without labels; and what is wrong with the labels."""
    if source.label_column is None and not source.unlabelled:
        return None, ""
    try:
        return dict(sorted(Counter(source.labels()).items())), ""
    except UserError as error:
        return None, str(error) if source.label_column else ""
