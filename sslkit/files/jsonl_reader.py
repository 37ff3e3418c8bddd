"""Read the JSONL files of a run: ``metrics``, ``results``, ``diagnostics`` and ``bad_samples``.

`read_log` reads a whole file, `LogFollower` only what was added since the last read. Both check every row. A process
may be killed in the middle of a line, and users edit files: invalid lines are skipped and counted, and never stop a
command.
"""

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslkit.errors import UserError
from sslkit.terminal import print_message

Row = dict[str, Any]
Check = Callable[[Any], bool]

LARGEST = 1e300  # sums and means of smaller numbers stay finite
SMALLEST_STEP, LARGEST_STEP = 1e-9, 1e15
SHOWN = 3  # invalid lines that a warning lists
CHUNK = 4 * 2**20  # bytes that one call of `LogFollower.read` reads at most
MARK = 256  # bytes before the current offset, compared to detect a rewritten file
_printed_warnings: set[str] = set()


def number(value: Any) -> float | None:
    """The value as a finite float, or None if it is not a finite number."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST:
        return float(value)
    return None


def step_of(row: Mapping[str, Any]) -> float:
    """The step of a row; 0 if it has none."""
    return number(row.get("step")) or 0.0


def parse_row(line: bytes) -> Row | None:
    """The JSON object in a line; None if the line is incomplete or holds something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _is_positive(value: Any) -> bool:
    return SMALLEST_STEP < (number(value) or 0.0) < LARGEST_STEP


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST_STEP


def _is_share(value: Any) -> bool:
    return 0.0 <= (-1.0 if (found := number(value)) is None else found) <= 1.0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_interval(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_is_share, value)))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_scores(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(score, dict) for score in value)


# Keys that every row of a file has, and the types of optional keys.
REQUIRED: dict[str, dict[str, Check]] = {
    "metrics": {"step": _is_positive, "epoch": _is_positive},
    "results": {"step": _is_count, "accuracy": _is_share},
    "diagnostics": {"step": _is_positive},
    "bad_samples": {"index": _is_count, "name": _is_text, "reason": _is_text},
}
OPTIONAL: dict[str, dict[str, Check]] = {
    "results": {
        **dict.fromkeys(("by", "evaluation", "data", "measure", "protocol_hash"), _is_text),
        "epoch": lambda value: number(value) is not None,
        "interval": _is_interval,
        "protocol": lambda value: isinstance(value, dict),
        "scores": _are_scores,
    },
    "diagnostics": {"alarms": _are_texts},
}


@dataclass(frozen=True)
class Log:
    """The content of a JSONL file.

    Attributes:
        file: The file.
        rows: Its valid rows, in order.
        invalid: Line number and problem of each line that was skipped.
        num_lines: Number of non-empty lines.
    """

    file: Path
    rows: list[Row]
    invalid: list[tuple[int, str]]
    num_lines: int

    @property
    def warning(self) -> str:
        """One sentence about the skipped lines; empty if there are none."""
        if not self.invalid:
            return ""
        listed = "; ".join(f"line {line} {problem}" for line, problem in self.invalid[:SHOWN])
        more = f"; and {len(self.invalid) - SHOWN} more" if len(self.invalid) > SHOWN else ""
        return f"{self.file}: skipped {len(self.invalid)} of {self.num_lines} lines: {listed}{more}"


def read_log(file: Path) -> Log:
    """Read a JSONL file; a missing file has no rows.

    Raises:
        UserError: The file cannot be read.
    """
    rows, invalid, num_lines = _parse(file.stem, _read_lines(file))
    return Log(file, without_superseded(file.stem, rows), invalid, num_lines)


def rows_of(file: Path, log_message: Callable[[str], None] | None = None) -> list[Row]:
    """The valid rows of a file. Warns about skipped lines, by default once per file on standard error.

    Raises:
        UserError: The file cannot be read.
    """
    log = read_log(file)
    if log.warning:
        (log_message or _warn_once)(f"WARNING: {log.warning}")
    return log.rows


def read_lines(file: Path) -> list[Row]:
    """Every JSON object in a file, with any keys; other lines are skipped.

    Raises:
        UserError: The file cannot be read.
    """
    return [row for line in _read_lines(file) if (row := parse_row(line)) is not None]


def without_superseded(kind: str, rows: list[Row]) -> list[Row]:
    """Drop rows of steps that the run computed again later, in case they could not be removed from the file.

    Of ``results``, only the monitor's rows are computed again.
    """
    if kind not in ("metrics", "results", "diagnostics"):
        return rows
    kept, first = list[Row](), float("inf")
    for row in reversed(rows):
        if kind == "results" and row.get("by") != "monitor":
            kept.append(row)
        elif step_of(row) < first:
            kept.append(row)
            first = step_of(row)
    return kept[::-1]


@contextmanager
def open_regular(file: Path) -> Iterator[int]:
    """Open a regular file for reading and yield its descriptor. Links and pipes are refused: they may block forever.

    Raises:
        OSError: The file is missing or is not a regular file.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class NewRows:
    """What `LogFollower.read` found.

    Attributes:
        rows: Valid new rows.
        num_invalid: Number of new lines that were skipped.
        restarted: The file was replaced or cut: rows returned before are no longer valid.
        more: There is more to read now.
    """

    rows: list[Row] = field(default_factory=list)
    num_invalid: int = 0
    restarted: bool = False
    more: bool = False


class LogFollower:
    """Reads a JSONL file that another process appends to: complete lines only, each line once.

    A run that continues from a checkpoint removes the lines of later steps; the file is then read from its start. An
    incomplete last line is left until it is complete.

    Args:
        file: May be missing, and may vanish.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.offset, self.inode, self.mark = 0, 0, b""

    def read(self) -> NewRows:
        """Read at most 4 MB of new lines.

        Raises:
            UserError: The file exists and cannot be read.
        """
        try:
            with open_regular(self.file) as descriptor:
                return self._read(descriptor)
        except (FileNotFoundError, NotADirectoryError):
            restarted, self.offset = self.offset > 0, 0
            return NewRows(restarted=restarted)
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read: {error.strerror}") from error

    def _read(self, descriptor: int) -> NewRows:
        inode = os.fstat(descriptor).st_ino
        restarted = self.offset > 0 and not self._continues(descriptor, inode)
        if restarted:
            self.offset = 0
        data = os.pread(descriptor, CHUNK, self.offset)
        more = len(data) == CHUNK
        end = data.rfind(b"\n") + 1 or (CHUNK if more else 0)  # a line longer than CHUNK is skipped
        self.offset += end
        self.inode, self.mark = inode, data[max(end - MARK, 0) : end] if end else self.mark
        rows, invalid, _ = _parse(self.file.stem, data[:end].split(b"\n"))
        return NewRows(rows, len(invalid), restarted, more)

    def _continues(self, descriptor: int, inode: int) -> bool:
        start = self.offset - len(self.mark)
        return inode == self.inode and os.pread(descriptor, len(self.mark), start) == self.mark


def _parse(kind: str, lines: Iterable[bytes]) -> tuple[list[Row], list[tuple[int, str]], int]:
    """Valid rows, number and problem of each invalid line, and the number of non-empty lines."""
    rows, invalid, num_lines = list[Row](), list[tuple[int, str]](), 0
    for count, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        num_lines, row = num_lines + 1, parse_row(line)
        problem = "is not a complete JSON object" if row is None else _find_problem(kind, row)
        if row is None or problem:
            invalid.append((count, problem))
        else:
            rows.append(row)
    return rows, invalid, num_lines


def _read_lines(file: Path) -> list[bytes]:
    try:
        return file.read_bytes().split(b"\n") if file.is_file() else []
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error


def _find_problem(kind: str, row: Row) -> str:
    """What is wrong with the keys of a row; empty if nothing is."""
    for key, is_valid in REQUIRED.get(kind, {}).items():
        if key not in row:
            return f"has no {key}"
        if not is_valid(row[key]):
            return f"has {_shorten(row[key])} as {key}"
    for key, is_valid in OPTIONAL.get(kind, {}).items():
        if key in row and not is_valid(row[key]):
            return f"has {_shorten(row[key])} as {key}"
    return ""


def _shorten(value: Any) -> str:
    return "null" if value is None else ascii(value)[:40] if isinstance(value, str) else f"{type(value).__name__}"


def _warn_once(message: str) -> None:
    if message not in _printed_warnings:
        _printed_warnings.add(message)
        with suppress(OSError):  # standard error may be a file on a full disk
            print_message(message)
