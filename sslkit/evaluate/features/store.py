"""Features stored on disk, extracted once per encoder, images and transform, and memory-mapped afterwards."""

import errno
import json
import os
import shutil
import struct
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sslkit.errors import UserError
from sslkit.files.atomic import STALE_SECONDS
from sslkit.terminal import print_message

MERGED = "features.safetensors"
NOT_A_FOLDER = (errno.ENOTDIR, errno.EEXIST)  # the user's mistake, not a full or failing disk

# Arguments: keys, and the range of images. Returns the rows of the images for each key.
Extract = Callable[[Sequence[str], range], Sequence[Tensor]]

_warnings: set[str] = set()  # given by this process


@dataclass(frozen=True)
class FeatureStore:
    """A folder of features, with one subfolder per key.

    - An interrupted extraction keeps its finished shards and continues from them.
    - Several processes may extract the same features. Each starts at another shard and skips finished ones.
    - A damaged file, or one that another process removed, counts as missing.
    - When the folder exceeds ``max_bytes``, the least recently used features are removed.
    - Features that cannot be written, on a full or read-only disk, are kept in memory, with one warning.
    """

    folder: Path
    max_bytes: int = 20 * 10**9
    shard: int = 16384  # images

    @staticmethod
    def default() -> "FeatureStore":
        """The store in ``$SSLKIT_CACHE``, ``$XDG_CACHE_HOME/sslkit`` or ``~/.cache/sslkit``."""
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return FeatureStore(Path(os.environ.get("SSLKIT_CACHE") or Path(cache) / "sslkit") / "features")

    def load_or_extract(self, keys: Sequence[str], count: int, extract: Extract) -> list[Tensor]:
        """Load the features of distinct keys; extract and store the missing ones in one pass over ``count`` images.

        Returns (count, D) float32 for each key, memory-mapped. Raises `UserError` if the folder is a file or in a file.
        """
        found = {key: features for key in keys if (features := _load(self.folder / key / MERGED, count)) is not None}
        missing = [key for key in keys if key not in found]
        if missing:
            found |= _Extraction(self, missing, count, extract).run()
            self._make_room([self.folder / key for key in keys])
        for key in keys:
            with suppress(OSError):  # another process removed it, or the disk is read-only
                os.utime(self.folder / key)
        return [found[key] for key in keys]

    def _make_room(self, newest: list[Path]) -> None:
        """Remove the least recently used entries. Other processes may do the same at the same time."""
        entries = []
        with suppress(OSError):
            for entry in self.folder.iterdir():
                with suppress(OSError):
                    entries.append((entry.stat().st_mtime, entry, _size(entry)))
        total = sum(size for _, _, size in entries)
        for _, entry, size in sorted(entries):
            if total <= self.max_bytes:
                break
            if entry not in newest:
                shutil.rmtree(entry, ignore_errors=True)
                total -= size


class _Extraction:
    """One pass over the images for the missing features; arguments as for `FeatureStore.load_or_extract`."""

    def __init__(self, store: FeatureStore, keys: list[str], count: int, extract: Extract) -> None:
        self.folder, self.keys, self.count, self.extract = store.folder, keys, count, extract
        self.shards = [range(start, min(start + store.shard, count)) for start in range(0, count, store.shard)]
        self.in_memory: dict[tuple[str, int], Tensor] = {}

    def run(self) -> dict[str, Tensor]:
        """Extract all shards and merge them."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._warn(error)
        first = int(os.environ.get("RANK", os.getpid())) % len(self.shards)
        for number in [*range(first, len(self.shards)), *range(first)]:
            self._extract_shard(number)
        return {key: self._merge(key) for key in self.keys}

    def _extract_shard(self, number: int) -> None:
        """Extract a shard of the features that do not have it, and write it or keep it in memory."""
        rows = self.shards[number]
        missing = [
            key
            for key in self.keys
            if not _is_whole(self._shard_file(key, number), len(rows))
            and not _is_whole(self.folder / key / MERGED, self.count)
        ]
        if missing:
            for key, extracted in zip(missing, self.extract(missing, rows), strict=True):
                features = extracted.float().contiguous()
                if not self._write(self._shard_file(key, number), len(rows), [features]):
                    self.in_memory[key, number] = features

    def _merge(self, key: str) -> Tensor:
        """Concatenate the shards into one memory-mapped file; if it cannot be written, in memory."""
        merged = self.folder / key / MERGED
        features = _load(merged, self.count)
        if features is None:
            shards = [self._rows(key, number) for number in range(len(self.shards))]
            # Another process may have merged and removed the shards by now.
            if _is_whole(merged, self.count) or self._write(merged, self.count, shards):
                features = _load(merged, self.count)
            features = torch.cat(shards) if features is None else features
        self._tidy(merged.parent)
        return features

    def _rows(self, key: str, number: int) -> Tensor:
        """A shard; from the merged file, or extracted again, if another process removed its file."""
        rows = self.shards[number]
        if (key, number) in self.in_memory:
            return self.in_memory[key, number]
        if (shard := _load(self._shard_file(key, number), len(rows))) is not None:
            return shard
        if (merged := _load(self.folder / key / MERGED, self.count)) is not None:
            return merged[rows.start : rows.stop]
        return self.extract([key], rows)[0].float().contiguous()

    def _shard_file(self, key: str, number: int) -> Path:
        return self.folder / key / f"part-{number:05d}.safetensors"

    def _write(self, file: Path, rows: int, parts: Sequence[Tensor]) -> bool:
        """Write a file atomically; return False, with a warning, if it cannot be written."""
        temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write_rows(temporary, rows, parts)
                temporary.replace(file)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            # In the first two cases another process removed the entry, perhaps during `mkdir`.
            if not isinstance(error, FileNotFoundError | FileExistsError) or file.parent.is_file():
                self._warn(error)
            return False
        return True

    def _warn(self, error: OSError) -> None:
        """Warn once per process that features cannot be stored; raise `UserError` if the folder is a file."""
        if error.errno in NOT_A_FOLDER:
            raise UserError(
                f"feature store {self.folder}: {error}; remove that file, or pass --no-cache to store no features"
            ) from error
        warning = f"feature store {self.folder}: {error.strerror or error}; features are not stored, and the next"
        with suppress(OSError):  # standard error may be a file on the same disk
            if warning not in _warnings:
                _warnings.add(warning)
                print_message(f"WARNING: {warning} evaluation extracts them again")

    def _tidy(self, entry: Path) -> None:
        """Remove the shards of a merged file, and temporary files of killed processes."""
        if not _is_whole(entry / MERGED, self.count):
            return
        for file in _files_of(entry):
            with suppress(OSError):
                is_stale = file.name.startswith(".") and time.time() - file.stat().st_mtime > STALE_SECONDS
                if is_stale or file.name.startswith("part-"):
                    file.unlink()


def _files_of(entry: Path) -> list[Path]:
    """The files of an entry; none if another process removed it, perhaps in this moment."""
    try:
        return list(entry.iterdir())
    except FileNotFoundError:
        return []


def _size(entry: Path) -> int:
    """Size of an entry's files in bytes."""
    total = 0
    for file in _files_of(entry):
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def _load(file: Path, rows: int) -> Tensor | None:
    """Memory-map a file's features; None if it is missing, incomplete, or has another number of rows."""
    try:
        with safe_open(file, "pt") as opened:
            features: Tensor = opened.get_tensor("features")
    except (SafetensorError, OSError, RuntimeError):  # RuntimeError if it is removed after its header was read
        return None
    return features if features.dtype == torch.float32 and features.ndim == 2 and len(features) == rows else None


def _is_whole(file: Path, rows: int) -> bool:
    return _load(file, rows) is not None


def _write_rows(file: Path, rows: int, parts: Sequence[Tensor]) -> None:
    """Write all parts as one tensor of a safetensors file. Only one part needs to be in memory at a time."""
    width = parts[0].shape[1]
    header = json.dumps({"features": {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, 4 * rows * width]}})
    header += " " * (-len(header) % 8)
    with file.open("xb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header.encode())
        for part in parts:
            stream.write(part.numpy().data)
