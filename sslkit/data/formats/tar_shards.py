"""List the files in uncompressed tar files by their headers, so that they can be read in place and in any order.

Tar files are not trusted: sizes may be false, names of any bytes, and files truncated, which shows when they are read.
"""

import errno
import glob
import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sslkit.data.formats.folder_listing import display_path
from sslkit.errors import UserError

BLOCK = 512  # bytes; headers and contents begin at multiples of it
REGULAR = (b"0", b"\0", b"7")
LINKS = (b"1", b"2")
NO_CONTENT = (*LINKS, b"3", b"4", b"5", b"6")  # links, devices, folders, pipes, whatever size they state
MAX_NAME = 65_536  # bytes of an extended header, and of a label
MAX_SIZE = 2**60  # bytes; larger sizes are false and clipped to this one
UNREADABLE = -1  # size of a link, which has no content of its own
TAR_SUFFIXES = (".tar", ".tgz", *(f".tar.{kind}" for kind in ("gz", "zst", "bz2", "xz", "lz4")))
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x04\x22M": "lz4"}
BRACES, RANGE = re.compile(r"\{([^{}]+)\}"), re.compile(r"(\d{1,18})\.\.(\d{1,18})")
MAX_SHARDS = 1_000_000  # that a pattern may stand for


def is_shard(name: str) -> bool:
    """Whether a file name is that of a tar file, compressed or not."""
    return name.lower().endswith(TAR_SUFFIXES)


@dataclass(frozen=True)
class Member:
    """A file in a tar file: its name, and the position and size in bytes of its content (or `UNREADABLE`)."""

    name: bytes
    offset: int
    size: int


def find_shards(patterns: list[str]) -> list[Path]:
    """Find the tar files that match paths, optionally with ``*``, ``?``, ``{0000..0127}`` or ``{a,b}``; sorted.

    A pattern that matches no file, or stands for a name that does not exist, raises `UserError`.
    """
    found: set[str] = set()
    for pattern in patterns:
        for name in expand_braces(os.path.expanduser(pattern)):
            files = [name] if os.path.exists(name) else glob.glob(name, recursive=True)
            if not files:
                raise UserError(f"[data] path: no tar file {name!r}, which {pattern!r} stands for")
            found.update(files)
    return [Path(file) for file in sorted(found)]


def expand_braces(pattern: str) -> list[str]:
    """Every name that a pattern with ``{0000..0127}`` or ``{a,b}`` stands for; at most `MAX_SHARDS`."""
    pieces = BRACES.split(pattern)  # every other piece was between braces
    choices = [_choices(piece) if index % 2 else [piece] for index, piece in enumerate(pieces)]
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise UserError(f"[data] path: {pattern!r} stands for more than {MAX_SHARDS} files")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    """The alternatives between a pair of braces."""
    numbers = RANGE.fullmatch(inside)
    if not numbers:
        return inside.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if last - first >= MAX_SHARDS:
        raise UserError(f"[data] path: {{{inside}}} stands for more than {MAX_SHARDS} files")
    return [f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1)]


def walk(stream: BinaryIO, file: Path) -> Iterator[Member]:
    """Iterate over the regular files and links of a tar file, in order; only headers are read.

    The content of the last file may be truncated. An invalid header raises `UserError`, which names ``file``.
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
            if size > MAX_NAME:
                raise _broken(file, content, f"a name of {size} bytes")
            stream.seek(content)
            extension = stream.read(size)
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


def open_shard(file: Path) -> BinaryIO:
    """Open a tar file. One that may not be read or is not a regular file (a pipe would wait) raises `UserError`."""
    try:
        if file.exists() and not file.is_file():
            raise OSError(errno.EINVAL, "it is not a regular file")
        return file.open("rb", buffering=4096)
    except OSError as error:
        raise UserError(f"[data] path: cannot read {display_path(file)}: {error.strerror}") from error


def _check_header(header: bytes, at: int, file: Path) -> tuple[bytes, int]:
    """Type and size of the file that follows a header."""
    kind = next((name for magic, name in COMPRESSED.items() if not at and header.startswith(magic)), None)
    total = sum(header) - sum(header[148:156]) + 8 * 32  # the checksum field itself counts as spaces
    if kind and _number(header[148:156]) != total:
        raise UserError(
            f"[data] path: {display_path(file)} is compressed with {kind}, so its images cannot be read in "
            "any order; images are compressed already: decompress it once to a plain .tar"
        )
    if len(header) < BLOCK:
        raise _broken(file, at, "truncated within a header" if at else "too short for a tar file")
    if _number(header[148:156]) != total:
        raise _broken(file, at, "an invalid header")
    size = _number(header[124:136])
    if size is None:
        raise _broken(file, at, "a size that is not a number")
    return header[156:157], min(size, MAX_SIZE)


def _number(digits: bytes) -> int | None:
    """A number in octal digits, or in bytes after 0x80, as GNU tar writes large ones; None if invalid or negative."""
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


def _pax(records: bytes, file: Path, at: int) -> tuple[bytes, int]:
    """Name and size in a POSIX extended header; empty and -1 if it has none."""
    name, size = b"", -1
    while records:
        length, space, _ = records.partition(b" ")
        if not (space and length.isdigit() and len(length) < int(length) <= len(records)):
            raise _broken(file, at, "an invalid extended header")
        key, _, value = records[len(length) + 1 : int(length) - 1].partition(b"=")
        if key.startswith(b"GNU.sparse"):
            raise _broken(file, at, "a file with holes (GNU sparse); pack it without --sparse")
        if key == b"path":
            name = value.split(b"\0")[0]
        elif key == b"size":
            if not value.isdigit() or len(value) > 30:
                raise _broken(file, at, "a size that is not a number")
            size = min(int(value), MAX_SIZE)
        records = records[int(length) :]
    return name, size


def _broken(file: Path, at: int, what: str) -> UserError:
    return UserError(
        f"[data] path: {display_path(file)} is not a readable tar file: {what} (at byte {at}); make it "
        "again or remove it from the data"
    )
