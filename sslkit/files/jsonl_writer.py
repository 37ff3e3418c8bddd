"""Write the JSONL files of a run, from several processes and on disks that may be full.

Writers append under a lock on the file itself. Rows are removed by reading, writing and renaming under the same lock;
a writer that waited for the lock checks that the file was not replaced. Without locks, ``results.jsonl``, the only file
with several writers, is only appended to, and `jsonl_reader` skips rows that a run has written again.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from sslkit.files.atomic import replace_file
from sslkit.files.jsonl_reader import Row, parse_row, read_lines, step_of
from sslkit.text import pluralize

MAX_PENDING = 100_000  # lines kept in memory while the disk is full; the oldest are dropped first
LOCK_TIMEOUT = 10.0  # seconds to wait for another writer; a frozen one must not stop a run
LOCK_INTERVAL = 0.002  # seconds between attempts to lock


class JsonlWriter:
    """Appends rows to a file. Rows that cannot be written stay in memory and are written before the next one.

    ``log_message`` is called with a sentence whenever writing fails.
    """

    def __init__(self, file: Path, log_message: Callable[[str], None]) -> None:
        self.file, self.log_message = file, log_message
        self.pending: list[str] = []

    def append(self, fields: dict[str, Any]) -> None:
        """Write a row, after the pending ones."""
        self.pending = [*self.pending[-MAX_PENDING + 1 :], json.dumps(fields) + "\n"]
        self.flush()

    def flush(self) -> None:
        """Try to write the pending rows."""
        if not self.pending:
            return
        try:
            append_text(self.file, "".join(self.pending))
            self.pending = []
        except OSError as error:
            lines = pluralize(len(self.pending), "line")
            self.log_message(f"WARNING: {self.file}: {error.strerror or error}; {lines} will be written later")

    def remove_after(self, step: int, only_by: str | None = None) -> float:
        """Remove the rows of later steps, on the disk and pending; see `remove_after`."""
        self.flush()
        self.pending = [line for line in self.pending if not _is_later(line.encode(), step, only_by)]
        try:
            return remove_after(self.file, step, only_by)
        except OSError as error:
            self.log_message(
                f"WARNING: {self.file}: cannot remove the lines after step {step}: {error.strerror or error}; "
                "they are ignored once these steps are computed again"
            )
            return _latest_step(read_lines(self.file), only_by)


def append_text(file: Path, text: str) -> None:
    """Append complete lines or nothing (`OSError`). An incomplete last line, left by a crash, is ended first."""
    with _open_locked(file) as (stream, locked):
        size = stream.seek(0, os.SEEK_END)
        if size and os.pread(stream.fileno(), 1, size - 1) != b"\n":
            text = "\n" + text
        data = memoryview(text.encode())
        written = 0
        try:
            while written < len(data):
                written += stream.write(data[written:])
        except OSError:
            if locked or os.fstat(stream.fileno()).st_size == size + written:
                os.ftruncate(stream.fileno(), size)
            raise


def remove_after(file: Path, step: int, only_by: str | None = None) -> float:
    """Remove the rows of steps after ``step``, so that a resumed run repeats none. Other lines are unchanged.

    With ``only_by``, rows whose ``by`` differs are kept, and incomplete lines, which another process may be writing.
    Returns the latest step of the rows concerned, before any was removed; 0 if there are none. Raises `OSError` if the
    file could not be written; it is unchanged.
    """
    if not file.is_file():
        return 0
    with _open_locked(file) as (stream, locked):
        content = _read_all(stream)
        lines = [line for line in content.split(b"\n") if line.strip()]
        kept = [line for line in lines if not _is_later(line, step, only_by)]
        if len(kept) < len(lines) and (locked or only_by is None):
            replace_file(file, [line + b"\n" for line in kept])
            # A writer that does not use locks may have appended to the old file meanwhile.
            if late := _read_all(stream)[len(content) :]:
                append_text(file, late.decode(errors="replace"))
    return _latest_step([row for line in lines if (row := parse_row(line)) is not None], only_by)


def _latest_step(rows: list[Row], only_by: str | None) -> float:
    return max((step_of(row) for row in rows if _is_by(row, only_by)), default=0)


def _is_by(row: Row, only_by: str | None) -> bool:
    return only_by is None or row.get("by") == only_by


def _is_later(line: bytes, step: int, only_by: str | None) -> bool:
    row = parse_row(line)
    if row is None:
        return only_by is None
    return _is_by(row, only_by) and step_of(row) > step


def _read_all(stream: FileIO) -> bytes:
    stream.seek(0)
    return stream.read()


@contextmanager
def _open_locked(file: Path) -> Iterator[tuple[FileIO, bool]]:
    """Open a file to read and append; yields it and whether it is locked against other writers."""
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        with file.open("a+b", buffering=0) as stream:
            locked = _lock(stream, deadline)
            if not locked or _is_current(stream, file):
                yield stream, locked
                return


def _lock(stream: FileIO, deadline: float) -> bool:
    """Lock an open file; False if the file system has no locks, or another process holds it for too long.

    The lock belongs to the open file, not to the process (``flock``, not ``lockf``): it survives when another thread,
    such as the one that saves, opens and closes the same file.
    """
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK or time.monotonic() > deadline:
                return False
        time.sleep(LOCK_INTERVAL)


def _is_current(stream: FileIO, file: Path) -> bool:
    """Whether an open file was neither replaced nor removed since it was opened."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False
