"""The new lines of a file that another process appends to, and may take back."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslkit.errors import UserError
from sslkit.files.jsonl_reader import parse_row

CHUNK = 4 * 2**20  # bytes that a look reads at most
MARK = 256  # bytes before the place reached that must still be there


@contextmanager
def plain_file(file: Path) -> Iterator[int]:
    """A descriptor to read a file by; a link or a pipe of its name could lead anywhere, or never end.

    Raises:
        OSError: It is not there, or is no plain file.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no plain file")
        yield descriptor
    finally:
        os.close(descriptor)


def read_plain(file: Path, most: int) -> bytes:
    """The first ``most`` bytes of a plain file.

    Raises:
        OSError: As `plain_file`.
    """
    with plain_file(file) as descriptor:
        return os.pread(descriptor, most, 0)


@dataclass(frozen=True)
class News:
    """What a look at a file found.

    Attributes:
        rows: The objects of its new lines.
        again: Whether the file is another one than before, or was cut: what was read counts no more.
        more: Whether there is more to read at once.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    again: bool = False
    more: bool = False


class Tail:
    """Reads a JSONL file piece by piece, whole lines only, each once.

    A run that is continued rewrites its files without the lines that it will write again; then all is read from the
    start. A last line without its end is left until it has one; a line that is no JSON object is passed over.

    Args:
        file: It need not be there yet, and may go.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.offset, self.inode, self.mark = 0, 0, b""

    def look(self) -> News:
        """Read on, at most 4 MB.

        Raises:
            UserError: The file is there and cannot be read.
        """
        try:
            with plain_file(self.file) as descriptor:
                return self._read(descriptor)
        except (FileNotFoundError, NotADirectoryError):
            again, self.offset = self.offset > 0, 0
            return News(again=again)
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read: {error.strerror}") from error

    def _read(self, descriptor: int) -> News:
        inode = os.fstat(descriptor).st_ino
        again = self.offset > 0 and not self._goes_on(descriptor, inode)
        if again:
            self.offset = 0
        data = os.pread(descriptor, CHUNK, self.offset)
        full = len(data) == CHUNK
        end = data.rfind(b"\n") + 1 or (CHUNK if full else 0)  # a line longer than any of ours is passed over
        self.offset += end
        self.inode, self.mark = inode, data[max(end - MARK, 0) : end] if end else self.mark
        return News([row for line in data[:end].split(b"\n") if (row := parse_row(line)) is not None], again, full)

    def _goes_on(self, descriptor: int, inode: int) -> bool:
        start = self.offset - len(self.mark)
        return inode == self.inode and os.pread(descriptor, len(self.mark), start) == self.mark
