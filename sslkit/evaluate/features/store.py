"""Features kept on disk: extracted once for an encoder, images and a transform, then memory-mapped."""

import errno
import json
import os
import shutil
import struct
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sslkit.errors import UserError
from sslkit.files.atomic import ABANDONED
from sslkit.terminal import print_message

SHARD = 16384
MERGED = "features.safetensors"
NO_PLACE = (errno.ENOTDIR, errno.EEXIST)  # the store's folder cannot be one: a mistake, and nothing of the disk's

_said: set[str] = set()  # what this process has said
Extract = Callable[[range], Tensor]
ExtractAll = Callable[[Sequence[str], range], Sequence[Tensor]]


@dataclass(frozen=True)
class FeatureStore:
    """A folder of features, each in a folder named by what they are of.

    An extraction that stops half-way keeps its finished shards and goes on from them. Several processes may work on
    the same features: each begins at another shard and leaves out what is there. A file that is damaged, or that
    another process has just removed to make room, counts as one that is not there. What was not used for longest is
    removed when the limit is passed.

    What cannot be written, on a disk that is full or read-only, is held in memory for this once, and said.

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

        Raises:
            UserError: The store's folder is a file, or lies in one.
        """
        found = {key: features for key in keys if (features := _load(self._merged(key), count)) is not None}
        missing = [key for key in keys if key not in found]
        if missing:
            found |= _Extraction(self, missing, count, extract).run()
            self._make_room([self.folder / key for key in keys])
        for key in keys:
            with suppress(OSError):  # removed meanwhile, or the disk is read-only
                os.utime(self.folder / key)
        return [found[key] for key in keys]

    def _merged(self, key: str) -> Path:
        return self.folder / key / MERGED

    def _make_room(self, newest: list[Path]) -> None:
        """Remove the entries that were not used for longest; others may do the same at the same time."""
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
    """One pass over the images for the features that are not there.

    Args:
        store: Where to keep them.
        keys: Of the features.
        count: Images.
        extract: As `FeatureStore.features_of_all` has it.
    """

    def __init__(self, store: FeatureStore, keys: list[str], count: int, extract: ExtractAll) -> None:
        self.store, self.keys, self.count, self.extract = store, keys, count, extract
        self.shards = [range(start, min(start + store.shard, count)) for start in range(0, count, store.shard)]
        self.held: dict[tuple[str, int], Tensor] = {}

    def run(self) -> dict[str, Tensor]:
        """Extract, shard by shard, and put the shards together."""
        self._open()
        first = int(os.environ.get("RANK", os.getpid())) % len(self.shards)
        for number in [*range(first, len(self.shards)), *range(first)]:
            self._see_to(number, self.keys)
        return {key: self._together(key) for key in self.keys}

    def _open(self) -> None:
        """See that the store's folder is one, before anything is extracted."""
        try:
            self.store.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._complain(error)

    def _see_to(self, number: int, keys: Iterable[str]) -> None:
        """Have a shard of each of the features, on the disk or in memory."""
        rows = self.shards[number]
        absent = [
            key
            for key in keys
            if not _is_whole(self._part(key, number), len(rows)) and not _is_whole(self.store._merged(key), self.count)
        ]
        if absent:
            for key, found in zip(absent, self.extract(absent, rows), strict=True):
                features = found.float().contiguous()
                if not self._write(self._part(key, number), len(rows), [features]):
                    self.held[key, number] = features

    def _together(self, key: str) -> Tensor:
        """One file instead of the shards, mapped; in memory if it cannot be written."""
        merged = self.store._merged(key)
        features = _load(merged, self.count)
        if features is None:
            parts = [self._rows(key, number) for number in range(len(self.shards))]
            # Another process may have merged them by now, and removed the parts.
            if _is_whole(merged, self.count) or self._write(merged, self.count, parts):
                features = _load(merged, self.count)
            features = torch.cat(parts) if features is None else features
        self._tidy(merged.parent)
        return features

    def _rows(self, key: str, number: int) -> Tensor:
        """A shard, mapped or held; taken out of the merged file, or extracted again, if another process removed it."""
        rows = self.shards[number]
        if (key, number) in self.held:
            return self.held[key, number]
        if (part := _load(self._part(key, number), len(rows))) is not None:
            return part
        if (merged := _load(self.store._merged(key), self.count)) is not None:
            return merged[rows.start : rows.stop]
        return self.extract([key], rows)[0].float().contiguous()

    def _part(self, key: str, number: int) -> Path:
        return self.store.folder / key / f"part-{number:05d}.safetensors"

    def _write(self, file: Path, rows: int, parts: Sequence[Tensor]) -> bool:
        """Write whole or not at all, whoever else writes the same; False, and a word of it, if it cannot be written."""
        aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write_rows(aside, rows, parts)
                aside.replace(file)
            finally:
                aside.unlink(missing_ok=True)
        except (FileNotFoundError, FileExistsError) as error:  # the entry was removed to make room, perhaps in `mkdir`
            if file.parent.is_file():
                self._complain(error)
            return False
        except OSError as error:
            self._complain(error)
            return False
        return True

    def _complain(self, error: OSError) -> None:
        """Say, once a process, that features cannot be kept; raise what is a mistake and not the disk's."""
        if error.errno in NO_PLACE:
            raise UserError(
                f"feature store {self.store.folder}: {error}; free it, or leave it out with --no-cache"
            ) from error
        sentence = (
            f"feature store {self.store.folder}: {error.strerror or error}; these features are not kept, and the next"
        )
        with suppress(OSError):  # standard error may be a file on the same disk
            if sentence not in _said:
                _said.add(sentence)
                print_message(f"WARNING: {sentence} evaluation extracts them again")

    def _tidy(self, entry: Path) -> None:
        """Remove the parts of a merged file, and what killed processes left aside."""
        if not _is_whole(entry / MERGED, self.count):
            return
        for left in _files_of(entry):
            if not left.name.startswith((".", "part-")):
                continue
            with suppress(OSError):
                if not left.name.startswith(".") or time.time() - left.stat().st_mtime > ABANDONED:
                    left.unlink()


def _files_of(entry: Path) -> list[Path]:
    """The files of an entry; none if another process has removed it meanwhile."""
    try:
        return sorted(entry.iterdir())
    except FileNotFoundError:
        return []


def _size(entry: Path) -> int:
    """Bytes of an entry's files; a file that goes meanwhile counts nothing."""
    total = 0
    for file in _files_of(entry):
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def _load(file: Path, rows: int) -> Tensor | None:
    """A file's features, mapped; None if it is not there, not as long as its header says, or has not so many rows."""
    try:
        with safe_open(file, "pt") as opened:
            features = opened.get_slice("features")
            shape: list[int] = features.get_shape()
            if features.get_dtype() != "F32" or len(shape) != 2 or shape[0] != rows:
                return None
            whole: Tensor = opened.get_tensor("features")
            return whole
    except (
        SafetensorError,
        OSError,
        RuntimeError,
    ):  # PyTorch's own, if another process removes it between two openings
        return None


def _is_whole(file: Path, rows: int) -> bool:
    return _load(file, rows) is not None


def _write_rows(file: Path, rows: int, parts: Sequence[Tensor]) -> None:
    """One safetensors file of all parts, of which never more than one need be in memory."""
    width = parts[0].shape[1]
    header = json.dumps({"features": {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, 4 * rows * width]}})
    header += " " * (-len(header) % 8)
    with file.open("xb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header.encode())
        for part in parts:
            stream.write(part.numpy().data)
