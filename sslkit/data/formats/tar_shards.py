"""List the files in tar files by their headers, so that they can be read in place and in any order.

Only uncompressed tar files can be read like this. They are not trusted: sizes may be false, names may be of any bytes,
and files may be truncated, which shows when they are read.
"""

import glob
import itertools
import math
import os
import re
import stat
from collections.abc import Iterator, Sequence
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
    """A file in a tar file.

    Attributes:
        name: Bytes of its name.
        offset: Position of its content in the tar file.
        size: Size of its content in bytes, or `UNREADABLE`.
    """

    name: bytes
    offset: int
    size: int


def find_shards(patterns: list[str]) -> list[Path]:
    """Find the tar files that match patterns, sorted.

    Args:
        patterns: Paths, optionally with ``*``, ``?``, ``{0000..0127}`` or ``{a,b}``.

    Raises:
        UserError: A pattern matches no file, or a name that it stands for does not exist.
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
    """Every name that a pattern with ``{0000..0127}`` or ``{a,b}`` stands for.

    Raises:
        UserError: There are more than `MAX_SHARDS`.
    """
    pieces = BRACES.split(pattern)
    choices: list[Sequence[str]] = [
        [piece] if index % 2 == 0 else _choices(piece) for index, piece in enumerate(pieces)
    ]
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise UserError(f"[data] path: {pattern!r} stands for more than {MAX_SHARDS} files")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(inside: str) -> Sequence[str]:
    """The alternatives between a pair of braces."""
    numbers = RANGE.fullmatch(inside)
    if not numbers:
        return inside.split(",")
    first, last = numbers[1], numbers[2]
    if int(last) - int(first) >= MAX_SHARDS:
        raise UserError(f"[data] path: {{{inside}}} stands for more than {MAX_SHARDS} files")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def walk(stream: BinaryIO, file: Path) -> Iterator[Member]:
    """Iterate over the regular files and links of a tar file, in order; only headers are read.

    The content of the last file may be truncated.

    Args:
        stream: The tar file.
        file: Its path, for errors.

    Raises:
        UserError: A header is invalid.
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
            raise broken(file, content - BLOCK, "a file with holes (GNU sparse); pack it without --sparse")
        if kind not in (b"g", b"K"):
            long_name, long_size = b"", -1


def open_shard(file: Path) -> BinaryIO:
    """Open a tar file; never waits for a pipe.

    Raises:
        UserError: It does not exist, or is not a regular file.
    """
    try:
        stream = open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=4096)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"[data] path: cannot read {display_path(file)}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise UserError(f"[data] path: {display_path(file)} is not a regular file")
    return stream


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
        raise broken(file, at, "truncated within a header" if at else "too short for a tar file")
    if _number(header[148:156]) != total:
        raise broken(file, at, "an invalid header")
    size = _number(header[124:136])
    if size is None:
        raise broken(file, at, "a size that is not a number")
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


def _extension(stream: BinaryIO, file: Path, at: int, size: int) -> bytes:
    if size > MAX_NAME:
        raise broken(file, at, f"a name of {size} bytes")
    stream.seek(at)
    return stream.read(size)


def _pax(records: bytes, file: Path, at: int) -> tuple[bytes, int]:
    """Name and size in a POSIX extended header; empty and -1 if it has none."""
    name, size = b"", -1
    while records:
        length, space, _ = records.partition(b" ")
        if not (space and length.isdigit() and len(length) < int(length) <= len(records)):
            raise broken(file, at, "an invalid extended header")
        key, _, value = records[len(length) + 1 : int(length) - 1].partition(b"=")
        if key.startswith(b"GNU.sparse"):
            raise broken(file, at, "a file with holes (GNU sparse); pack it without --sparse")
        if key == b"path":
            name = value.split(b"\0")[0]
        elif key == b"size":
            if not value.isdigit() or len(value) > 30:
                raise broken(file, at, "a size that is not a number")
            size = min(int(value), MAX_SIZE)
        records = records[int(length) :]
    return name, size


def broken(file: Path, at: int, what: str) -> UserError:
    """The error about a tar file that cannot be read."""
    return UserError(
        f"[data] path: {display_path(file)} cannot be read as a tar file: {what} (at byte {at}); pack it "
        "again or leave it out"
    )
