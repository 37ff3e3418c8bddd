"""Read the JSONL files of a run: ``metrics``, ``results``, ``diagnostics`` and ``bad_samples``.

Every row is checked. A process may be killed in the middle of a line, and users edit files: invalid lines are skipped
and counted, and never stop a command. A file that exists and cannot be read raises `UserError`.
"""

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, InstanceOf, ValidationError

from sslkit.errors import UserError
from sslkit.terminal import print_message

Row = dict[str, Any]

LARGEST = 1e300  # sums and means of smaller numbers stay finite
SHOWN = 3  # invalid lines that a warning lists
CHUNK = 4 * 2**20  # bytes that one call of `LogFollower.read` reads at most
MARK = 256  # bytes before the current offset, compared to detect a rewritten file


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


Number = Annotated[float, Field(strict=True, gt=-LARGEST, lt=LARGEST, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=1e-9, lt=1e15, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0.0, le=1.0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0, lt=10**15)]
Text = InstanceOf[str]  # str itself would refuse half of a surrogate pair


class _MetricsRow(BaseModel):
    step: Positive
    epoch: Positive


class _ResultsRow(BaseModel):
    step: Count
    accuracy: Share
    by: Text = ""
    evaluation: Text = ""
    data: Text = ""
    measure: Text = ""
    protocol_hash: Text = ""
    epoch: Number = 0.0
    interval: tuple[Share, Share] | None = None
    protocol: InstanceOf[dict[str, Any]] = {}
    scores: list[InstanceOf[dict[str, Any]]] = []


class _DiagnosticsRow(BaseModel):
    step: Positive
    alarms: list[Text] = []


class _BadSamplesRow(BaseModel):
    index: Count
    name: Text
    reason: Text


# What the rows of each file must hold. Other keys may hold anything.
ROWS: dict[str, type[BaseModel]] = {
    **{"metrics": _MetricsRow, "results": _ResultsRow},
    **{"diagnostics": _DiagnosticsRow, "bad_samples": _BadSamplesRow},
}


@dataclass(frozen=True)
class Log:
    """The content of a JSONL file."""

    file: Path
    rows: list[Row]  # the valid ones, in order
    invalid: list[tuple[int, str]]  # line number and problem of each line that was skipped
    num_lines: int  # that are not empty

    @property
    def warning(self) -> str:
        """One sentence about the skipped lines; empty if there are none."""
        if not self.invalid:
            return ""
        listed = "; ".join(f"line {line} {problem}" for line, problem in self.invalid[:SHOWN])
        more = f"; and {len(self.invalid) - SHOWN} more" if len(self.invalid) > SHOWN else ""
        return f"{self.file}: skipped {len(self.invalid)} of {self.num_lines} lines: {listed}{more}"


def read_log(file: Path) -> Log:
    """Read a JSONL file; a missing file has no rows."""
    log = _parse(file, _read_lines(file))
    return replace(log, rows=without_superseded(file.stem, log.rows))


def rows_of(file: Path, log_message: Callable[[str], None] | None = None) -> list[Row]:
    """The valid rows of a file. Warns about skipped lines, by default once per file on standard error."""
    log = read_log(file)
    if log.warning:
        (log_message or _warn_once)(f"WARNING: {log.warning}")
    return log.rows


def read_lines(file: Path) -> list[Row]:
    """Every JSON object in a file, with any keys; other lines are skipped."""
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
    """Open a regular file and yield its descriptor; `OSError` for links and pipes, which may block forever."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class NewRows:
    """What `LogFollower.read` found."""

    rows: list[Row] = field(default_factory=list)
    num_invalid: int = 0  # new lines that were skipped
    restarted: bool = False  # the file was replaced or cut: rows returned before are no longer valid
    more: bool = False  # there is more to read now


class LogFollower:
    """Reads a JSONL file that another process appends to: complete lines only, each line once. The file may be missing.

    A run that continues from a checkpoint removes the lines of later steps; the file is then read from its start. An
    incomplete last line is left until it is complete.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.offset, self.inode, self.mark = 0, 0, b""

    def read(self) -> NewRows:
        """Read at most 4 MB of new lines."""
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
        log = _parse(self.file, data[:end].split(b"\n"))
        return NewRows(log.rows, len(log.invalid), restarted, more)

    def _continues(self, descriptor: int, inode: int) -> bool:
        start = self.offset - len(self.mark)
        return inode == self.inode and os.pread(descriptor, len(self.mark), start) == self.mark


def _parse(file: Path, lines: Iterable[bytes]) -> Log:
    rows, invalid = list[Row](), list[tuple[int, str]]()
    for count, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = parse_row(line)
        problem = "is not a complete JSON object" if row is None else _find_problem(file.stem, row)
        if row is None or problem:
            invalid.append((count, problem))
        else:
            rows.append(row)
    return Log(file, rows, invalid, len(rows) + len(invalid))


def _read_lines(file: Path) -> list[bytes]:
    try:
        return file.read_bytes().split(b"\n") if file.is_file() else []
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error


def _find_problem(kind: str, row: Row) -> str:
    """What is wrong with the keys of a row; empty if nothing is."""
    try:
        if kind in ROWS:
            ROWS[kind].model_validate(row)
    except ValidationError as error:
        key = error.errors()[0]["loc"][0]
        return f"has {_shorten(row[key])} as {key}" if key in row else f"has no {key}"
    return ""


def _shorten(value: Any) -> str:
    return "null" if value is None else ascii(value)[:40] if isinstance(value, str) else f"{type(value).__name__}"


@cache
def _warn_once(message: str) -> None:
    with suppress(OSError):  # standard error may be a file on a full disk
        print_message(message)
