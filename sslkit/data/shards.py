"""Images in tar files, as WebDataset packs them: found once by their headers, then read where they lie, in any order.

Only plain tar files can be read so. Nothing in them is trusted: a size may be a lie, a name may be of any bytes, and
an image may be cut short, which shows when it is read.
"""

import glob
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow as pa

from sslkit.data.folder import SUFFIXES, place_in, printable, to_text
from sslkit.errors import UserError

BLOCK = 512  # bytes; headers and contents begin at multiples of it
REGULAR = (b"0", b"\0", b"7")
LINKS = (b"1", b"2")
NO_CONTENT = (*LINKS, b"3", b"4", b"5", b"6")  # whatever size they claim: links, devices, folders, pipes
MAX_NAME = 65_536  # bytes of a header's own extension, and of a label
MAX_SIZE = 2**60  # bytes; more is a lie, and one beyond all disks is as good as any
UNREADABLE = -1  # the size that stands for a link, which has no content of its own
TAR_SUFFIXES = (".tar", ".tgz", *(f".tar.{kind}" for kind in ("gz", "zst", "bz2", "xz", "lz4")))
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x04\x22M": "lz4"}
BRACES, RANGE = re.compile(r"\{([^{}]+)\}"), re.compile(r"(\d{1,18})\.\.(\d{1,18})")
MAX_SHARDS = 1_000_000  # that a pattern may name


def is_shard(name: str) -> bool:
    """Whether a file is named like a tar file, compressed or not."""
    return name.lower().endswith(TAR_SUFFIXES)


@dataclass(frozen=True)
class Member:
    """A file in a tar file: its name's bytes, where its content begins, and how many bytes it has."""

    name: bytes
    offset: int
    size: int


def find_shards(patterns: list[str]) -> list[Path]:
    """The tar files that patterns name, sorted.

    Args:
        patterns: Paths, with ``*`` and ``?``, ``{0000..0127}`` or ``{a,b}`` for several.

    Raises:
        UserError: A pattern names none, or one that is not there.
    """
    found: set[str] = set()
    for pattern in patterns:
        for name in expand_braces(os.path.expanduser(pattern)):
            files = [name] if os.path.exists(name) else glob.glob(name, recursive=True)
            if not files:
                raise UserError(f"[data] path: no tar file {name!r}, which {pattern!r} names")
            found.update(files)
    return [Path(file) for file in sorted(found)]


def expand_braces(pattern: str) -> list[str]:
    """Every name that a pattern with ``{0000..0127}`` or ``{a,b}`` in it stands for.

    Raises:
        UserError: There are more than a million.
    """
    pieces = BRACES.split(pattern)
    choices: list[Sequence[str]] = [
        [piece] if place % 2 == 0 else _choices(piece) for place, piece in enumerate(pieces)
    ]
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise UserError(f"[data] path: {pattern!r} names more than {MAX_SHARDS} files")
    return ["".join(words) for words in itertools.product(*choices)]


def _choices(inside: str) -> Sequence[str]:
    """The words that the inside of a pair of braces stands for."""
    numbers = RANGE.fullmatch(inside)
    if not numbers:
        return inside.split(",")
    first, last = numbers[1], numbers[2]
    if int(last) - int(first) >= MAX_SHARDS:
        raise UserError(f"[data] path: {{{inside}}} names more than {MAX_SHARDS} files")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def index_shards(files: list[Path], label: str | None) -> datasets.Dataset:
    """A row for each image of tar files, in their order: column ``image``, and one of labels if there are any.

    A sample is a run of files whose names are equal up to the first dot; its label is for each of its images.

    Args:
        files: Plain tar files.
        label: Suffix of the file that holds a sample's label, or a key of its ``.json``; None for ``cls`` where there
            is one.

    Raises:
        UserError: A file is not to be read as a plain tar file, or a label is none.
    """
    if label == "image":
        raise UserError("[data] label_column: 'image' is the column of images itself")
    chunks, labels = [], []
    for file in files:
        places, words = _index(file, label or "cls")
        chunks.append(pa.array(places, pa.string()))
        labels.append(pa.array(words, pa.string()))
    images = [
        pa.StructArray.from_arrays([pa.nulls(len(each), pa.binary()), each], ["bytes", "path"]) for each in chunks
    ]
    features = {"image": datasets.Image(decode=False)}
    columns = {"image": pa.chunked_array(images, features["image"].pa_type)}
    if any(len(each) > each.null_count for each in labels):
        name = label or "cls"
        columns[name], features[name] = pa.chunked_array(labels, pa.string()), datasets.Value("string")
    elif label is not None and any(map(len, labels)):
        raise UserError(f"[data] label_column: beside no image lies a .{label}, or a .json with a key {label!r}")
    table = pa.table(columns).combine_chunks()
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=datasets.Features(features)))


def _index(file: Path, label: str) -> tuple[list[str], list[str | None]]:
    """Places of the images of one tar file, and their labels."""
    places: list[str] = []
    labels: list[str | None] = []
    shard = to_text(str(file))
    with _open_shard(file) as stream:
        key, start, word = b"", 0, None
        for member in walk(stream, file):
            base = member.name[member.name.rfind(b"/") + 1 :]
            stem, dot, suffixes = base.partition(b".")
            sample = member.name[: len(member.name) - len(dot + suffixes)]
            if sample != key:
                labels[start:] = [word] * (len(places) - start)
                key, start, word = sample, len(places), None
            suffix = suffixes.rpartition(b".")[2].decode("latin-1").lower()
            if not stem or not dot:
                continue
            if "." + suffix in SUFFIXES:
                places.append(place_in(shard, member.offset, member.size, to_text(os.fsdecode(member.name))))
                labels.append(None)
            elif (found := _label(stream, file, member, suffix, label)) is not None:
                if word is not None:
                    raise _broken(file, member.offset, f"the second label of {printable(to_text(os.fsdecode(key)))}")
                word = found
        labels[start:] = [word] * (len(places) - start)
    return places, labels


def _label(stream: BinaryIO, file: Path, member: Member, suffix: str, label: str) -> str | None:
    """The label that a member holds, if it holds one."""
    if suffix not in (label, "json") or (suffix == "json" and label in ("cls", "txt")):
        return None
    if not 0 <= member.size <= MAX_NAME:
        raise _broken(file, member.offset, f"a label of {member.size} bytes, where {MAX_NAME} would do")
    stream.seek(member.offset)
    text = stream.read(member.size).decode("utf-8", "replace").strip()
    if suffix == label:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(file, member.offset, "a .json that is none") from error
    found = value.get(label) if isinstance(value, dict) else None
    return str(found) if isinstance(found, str | int) else None


def walk(stream: BinaryIO, file: Path) -> Iterator[Member]:
    """Every regular file and link of a tar file, in its order; only headers are read.

    The last one's content may be cut short.

    Args:
        stream: The tar file.
        file: How errors name it.

    Raises:
        UserError: A header is broken.
    """
    end, at, long_name, long_size = os.fstat(stream.fileno()).st_size, 0, b"", -1
    while at < end:
        stream.seek(at)
        header = stream.read(BLOCK)
        if header == bytes(BLOCK):
            return
        kind, size = _check_header(header, at, file)
        content, size = at + BLOCK, size if long_size < 0 else long_size
        at = content + (0 if kind in NO_CONTENT else -(-size // BLOCK) * BLOCK)
        if kind in (b"x", b"L"):
            extension = _extension(stream, file, content, size)
            if kind == b"L":
                long_name = extension.split(b"\0")[0]
            else:
                long_name, long_size = _pax(extension, file, content)
            continue
        if kind in REGULAR or kind in LINKS:
            yield Member(long_name or _name(header), content, UNREADABLE if kind in LINKS else size)
        elif kind == b"S":
            raise _broken(file, content - BLOCK, "a file with holes (GNU sparse); pack it without --sparse")
        if kind not in (b"g", b"K"):
            long_name, long_size = b"", -1


def _open_shard(file: Path) -> BinaryIO:
    try:
        stream = open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=4096)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"[data] path: cannot read {printable(to_text(str(file)))}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise UserError(f"[data] path: {printable(to_text(str(file)))} is no regular file, so no tar file")
    return stream


def _check_header(header: bytes, at: int, file: Path) -> tuple[bytes, int]:
    """Kind and size of what follows a header."""
    kind = next((word for magic, word in COMPRESSED.items() if not at and header.startswith(magic)), None)
    total = sum(header) - sum(header[148:156]) + 8 * 32  # as if the sum itself were spaces
    if kind and _number(header[148:156]) != total:
        raise UserError(
            f"[data] path: {printable(to_text(str(file)))} is compressed by {kind}, so that no image in it can be read "
            "without all those before it; images are compressed already: decompress it once to a plain .tar"
        )
    if len(header) < BLOCK:
        raise _broken(file, at, "cut short within a header" if at else "too short for a tar file")
    if _number(header[148:156]) != total:
        raise _broken(file, at, "no tar header")
    size = _number(header[124:136])
    if size is None:
        raise _broken(file, at, "a size that is no number")
    return header[156:157], min(size, MAX_SIZE)


def _number(digits: bytes) -> int | None:
    """Octal digits, or, as GNU writes large numbers, bytes after one of 0x80; None if neither or negative."""
    if digits[:1] == b"\x80":
        return int.from_bytes(digits[1:], "big")
    try:
        return int(digits.split(b"\0")[0].strip() or b"0", 8) if b"-" not in digits else None
    except ValueError:
        return None


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _extension(stream: BinaryIO, file: Path, at: int, size: int) -> bytes:
    if size > MAX_NAME:
        raise _broken(file, at, f"a name of {size} bytes")
    stream.seek(at)
    return stream.read(size)


def _pax(records: bytes, file: Path, at: int) -> tuple[bytes, int]:
    """Name and size in a POSIX extended header, empty and -1 where it does not say."""
    name, size = b"", -1
    while records:
        length, space, _ = records.partition(b" ")
        if not (space and length.isdigit() and len(length) < int(length) <= len(records)):
            raise _broken(file, at, "a broken extended header")
        key, _, value = records[len(length) + 1 : int(length) - 1].partition(b"=")
        if key.startswith(b"GNU.sparse"):
            raise _broken(file, at, "a file with holes (GNU sparse); pack it without --sparse")
        if key == b"path":
            name = value.split(b"\0")[0]
        elif key == b"size":
            if not value.isdigit() or len(value) > 30:
                raise _broken(file, at, "a size that is no number")
            size = min(int(value), MAX_SIZE)
        records = records[int(length) :]
    return name, size


def _broken(file: Path, at: int, what: str) -> UserError:
    return UserError(
        f"[data] path: {printable(to_text(str(file)))} cannot be read as a tar file: {what} (at byte {at}); pack it "
        "again or leave it out"
    )
