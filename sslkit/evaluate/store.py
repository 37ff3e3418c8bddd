"""Features kept on disk: extracted once for an encoder, images and a transform, then memory-mapped."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sslkit.errors import UserError

SHARD = 16384
MERGED = "features.safetensors"

Extract = Callable[[range], Tensor]
ExtractAll = Callable[[Sequence[str], range], Sequence[Tensor]]


@dataclass(frozen=True)
class FeatureStore:
    """A folder of features, each in a folder named by what they are of.

    An extraction that stops half-way keeps its finished shards and goes on from them. Several processes may work on
    the same features: each begins at another shard and leaves out what is there. A file that is damaged counts as one
    that is not there, and is replaced. What was not used for longest is removed when the limit is passed.

    Attributes:
        folder: Where to keep them.
        max_bytes: Limit of the whole folder.
        shard: Images of a shard.
    """

    folder: Path
    max_bytes: int = 20 * 10**9
    shard: int = SHARD

    @staticmethod
    def default() -> "FeatureStore":
        """In ``$SSLKIT_CACHE``, else in ``$XDG_CACHE_HOME/sslkit`` or ``~/.cache/sslkit``."""
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return FeatureStore(Path(os.environ.get("SSLKIT_CACHE") or Path(cache) / "sslkit") / "features")

    def features(self, key: str, count: int, extract: Extract) -> Tensor:
        """The (count, D) float32 features of ``key``, memory-mapped; extracted first if they are not there.

        Args:
            key: Hexadecimal name of what they are of: encoder, images, transform, reading.
            count: Images.
            extract: Gives the rows of a range of images.
        """
        return self.features_of_all([key], count, lambda _keys, rows: [extract(rows)])[0]

    def features_of_all(self, keys: Sequence[str], count: int, extract: ExtractAll) -> list[Tensor]:
        """Features that one pass over the images can give together; see `features`.

        Args:
            keys: Different names.
            count: Images.
            extract: Gives the rows of a range of images for those of the keys that are still to be had.
        """
        entries = [self.folder / key for key in keys]
        try:
            missing = [entry for entry in entries if not _is_whole(entry / MERGED, count)]
            if missing:
                self._fill(missing, count, extract)
                self._make_room(entries)
            for entry in entries:
                os.utime(entry)
            return [load_file(entry / MERGED)["features"] for entry in entries]
        except OSError as error:
            raise UserError(
                f"feature store {self.folder}: {error}; free it, or leave it out with --no-cache"
            ) from error

    def _fill(self, entries: list[Path], count: int, extract: ExtractAll) -> None:
        for entry in entries:
            entry.mkdir(parents=True, exist_ok=True)
        shards = [range(start, min(start + self.shard, count)) for start in range(0, count, self.shard)]
        first = int(os.environ.get("RANK", os.getpid())) % len(shards)
        for number in [*range(first, len(shards)), *range(first)]:
            rows = shards[number]
            absent = [
                each
                for each in entries
                if not _is_whole(_part(each, number), len(rows)) and not _is_whole(each / MERGED, count)
            ]
            if absent:
                for entry, found in zip(absent, extract([each.name for each in absent], rows), strict=True):
                    _replace(_part(entry, number), partial(save_file, {"features": found.float().contiguous()}))
        for entry in entries:
            _finish(entry, len(shards), count)

    def _make_room(self, newest: list[Path]) -> None:
        entries = sorted(
            (each for each in self.folder.iterdir() if each.is_dir()), key=lambda each: each.stat().st_mtime
        )
        sizes = {each: sum(file.stat().st_size for file in each.iterdir()) for each in entries}
        for entry in entries:
            if sum(sizes.values()) <= self.max_bytes:
                break
            if entry not in newest:
                shutil.rmtree(entry, ignore_errors=True)
                del sizes[entry]


def _finish(entry: Path, shards: int, count: int) -> None:
    """One file instead of the parts."""
    try:
        if not _is_whole(entry / MERGED, count):
            _replace(entry / MERGED, partial(_merge, [_part(entry, number) for number in range(shards)], count))
    except FileNotFoundError:
        if not _is_whole(entry / MERGED, count):  # else another process has merged them, and removed its parts
            raise
    for part in entry.glob("part-*"):
        part.unlink(missing_ok=True)


def _is_whole(file: Path, rows: int) -> bool:
    """Whether a file of features is there, as long as its header says, and has so many rows."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, "pt") as opened:
            features = opened.get_slice("features")
            shape: list[int] = features.get_shape()
            return features.get_dtype() == "F32" and len(shape) == 2 and shape[0] == rows
    except (SafetensorError, FileNotFoundError):  # the latter: another process has just removed it
        return False


def _part(entry: Path, number: int) -> Path:
    return entry / f"part-{number:05d}.safetensors"


def _replace(file: Path, write: Callable[[Path], None]) -> None:
    """Whole or not at all, whoever else writes the same."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(aside)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def _merge(parts: list[Path], count: int, file: Path) -> None:
    """One safetensors file of all parts, of which never more than one is in memory."""
    width = load_file(parts[0])["features"].shape[1]
    bytes_in_all = 4 * count * width
    header = json.dumps({"features": {"dtype": "F32", "shape": [count, width], "data_offsets": [0, bytes_in_all]}})
    header += " " * (-len(header) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header.encode())
        for part in parts:
            stream.write(load_file(part)["features"].numpy().tobytes())
