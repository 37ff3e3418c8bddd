"""Files of JSON lines that grow while a run trains, written: by several processes, and on a disk that may be full.

Nobody's line is lost. Writers append under a lock on the file itself; whoever takes lines out reads, writes and renames
under the same lock, and a writer that waited for it looks whether the file still has its name. Where a file system has
no locks, ``results.jsonl``, the one file with several writers, is only ever appended to, and
`sslkit.files.jsonl_reader` passes over what a run has made again.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from sslkit.files.atomic import replace_file
from sslkit.files.jsonl_reader import Row, parse_row, read_lines, step_of
from sslkit.text import pluralize

__all__ = ["Lines", "append_text", "keep_until", "read_lines", "settle_all", "step_of"]

OWED = 100_000  # lines that wait for room at the most; older ones are given up first
PATIENCE = 10.0  # seconds to wait for another writer; one that is frozen must not stop a run
PAUSE = 0.002  # seconds between two looks at a lock


class Lines:
    """Appends lines to one file. A line that finds no room waits in memory and is written before the next one.

    Args:
        file: Created by the first line.
        say: Told in a sentence, whenever writing fails.
    """

    def __init__(self, file: Path, say: Callable[[str], None]) -> None:
        self.file, self.say = file, say
        self.owed: list[str] = []

    def append(self, fields: dict[str, Any]) -> None:
        """Write a line, after those that are owed."""
        self.owed = [*self.owed[-OWED + 1 :], json.dumps(fields) + "\n"]
        self.settle()

    def settle(self) -> None:
        """Try to write what is owed."""
        if not self.owed:
            return
        try:
            append_text(self.file, "".join(self.owed))
            self.owed = []
        except OSError as error:
            waiting = f"{pluralize(len(self.owed), 'line')} {'waits' if len(self.owed) == 1 else 'wait'} for room"
            self.say(f"WARNING: {self.file}: {error.strerror or error}; {waiting}")

    def go_back(self, step: int, only_by: str | None = None) -> float:
        """Take out the lines of later steps, on the disk and of those that are owed; see `keep_until`."""
        self.settle()
        self.owed = [line for line in self.owed if not _is_later(line.encode(), step, only_by)]
        try:
            return keep_until(self.file, step, only_by)
        except OSError as error:
            self.say(
                f"WARNING: {self.file}: the lines after step {step} cannot be taken out: {error.strerror or error}; "
                "they are passed over once these steps are made again"
            )
            return max((step_of(row) for row in read_lines(self.file) if _is_by(row, only_by)), default=0)


def append_text(file: Path, text: str) -> None:
    """Append whole lines or nothing; a line that a crash left half-written before them is ended first.

    Raises:
        OSError: They could not be written; the file is as it was.
    """
    with _opened(file) as (stream, alone):
        size = stream.seek(0, os.SEEK_END)
        if size and os.pread(stream.fileno(), 1, size - 1) != b"\n":
            text = "\n" + text
        left = memoryview(text.encode())
        written = 0
        try:
            while written < len(left):
                written += stream.write(left[written:])
        except OSError:
            if alone or os.fstat(stream.fileno()).st_size == size + written:
                os.ftruncate(stream.fileno(), size)
            raise


def keep_until(file: Path, step: int, only_by: str | None = None) -> float:
    """Take out lines of steps after ``step``, so that a resumed run repeats none. Nothing else in the file is touched.

    Args:
        file: JSONL; it need not be there.
        step: The last that stays.
        only_by: Leave lines alone whose ``by`` is another, and torn ones, which may be somebody's half-written line;
            None where the run is the only writer.

    Returns:
        The latest step of the lines that this is about, before any was taken out; 0 if there is none.

    Raises:
        OSError: The file could not be written; it is as it was.
    """
    if not file.is_file():
        return 0
    with _opened(file) as (stream, alone):
        content = _content(stream)
        lines = [line for line in content.split(b"\n") if line.strip()]
        kept = [line for line in lines if not _is_later(line, step, only_by)]
        if len(kept) < len(lines) and (alone or only_by is None):
            replace_file(file, [line + b"\n" for line in kept])
            # A writer that knows of no locks may have added to what was the file until now.
            if late := _content(stream)[len(content) :]:
                append_text(file, late.decode(errors="replace"))
    rows = (row for line in lines if (row := parse_row(line)) is not None)
    return max((step_of(row) for row in rows if _is_by(row, only_by)), default=0)


def settle_all(files: Iterable[Lines]) -> None:
    """A last try to write what is owed, at the end of a run."""
    for file in files:
        file.settle()


def _is_by(row: Row, only_by: str | None) -> bool:
    return only_by is None or row.get("by") == only_by


def _is_later(line: bytes, step: int, only_by: str | None) -> bool:
    row = parse_row(line)
    if row is None:
        return only_by is None
    return _is_by(row, only_by) and step_of(row) > step


def _content(stream: FileIO) -> bytes:
    stream.seek(0)
    return stream.read()


@contextmanager
def _opened(file: Path) -> Iterator[tuple[FileIO, bool]]:
    """The file that bears the name, to read and to append to, and whether it is locked against other writers."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with file.open("a+b", buffering=0) as stream:
            alone = _lock(stream, deadline)
            if not alone or _bears(stream, file):
                yield stream, alone
                return


def _lock(stream: FileIO, deadline: float) -> bool:
    """Lock an open file; False where there are no locks, or another holds it for too long.

    It is the open file that is locked and not the process, so that another thread that opens and closes it, as one
    that saves does, takes nothing away.
    """
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK or time.monotonic() > deadline:
                return False
        time.sleep(PAUSE)


def _bears(stream: FileIO, file: Path) -> bool:
    """Whether an open file still has its name; it may have been replaced, or removed, since it was opened."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False
