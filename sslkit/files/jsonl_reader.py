"""Read the lines of JSON in a run folder: ``metrics``, ``results``, ``diagnostics`` and ``bad_samples``.

A process may be killed in the middle of a line, and files are edited by hand. A line that is no row of its file is left
out and counted, and never ends a command.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslkit.errors import UserError
from sslkit.terminal import say

Row = dict[str, Any]
Check = Callable[[Any], bool]

LARGEST = 1e300  # float arithmetic on anything below stays finite for a while
SMALLEST_STEP, LARGEST_STEP = 1e-9, 1e15
SHOWN = 3  # lines that a sentence names
_said: set[str] = set()


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST:
        return float(value)
    return None


def step_of(row: Mapping[str, Any]) -> float:
    """A row's step; 0 where it has none that is a number."""
    return number(row.get("step")) or 0.0


def parse_row(line: bytes) -> Row | None:
    """The object that a line holds; None if it is torn or holds something else."""
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


# What a row of each file must have, and of which type its other keys are where it has them.
NEEDED: dict[str, dict[str, Check]] = {
    "metrics": {"step": _is_positive, "epoch": _is_positive},
    "results": {"step": _is_count, "accuracy": _is_share},
    "diagnostics": {"step": _is_positive},
    "bad_samples": {"index": _is_count, "name": _is_text, "reason": _is_text},
}
OTHERS: dict[str, dict[str, Check]] = {
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
    """A file of rows, read.

    Attributes:
        file: Which.
        rows: Its rows, in their order.
        odd: Of each line that is left out, its number and what is wrong with it.
        lines: Lines in all.
    """

    file: Path
    rows: list[Row]
    odd: list[tuple[int, str]]
    lines: int

    @property
    def remark(self) -> str:
        """What is left out, as a sentence; empty if nothing is."""
        if not self.odd:
            return ""
        named = "; ".join(f"line {line} {why}" for line, why in self.odd[:SHOWN])
        more = f"; and {len(self.odd) - SHOWN} more" if len(self.odd) > SHOWN else ""
        return f"{self.file}: {len(self.odd)} of {self.lines} lines are left out: {named}{more}"


def read_log(file: Path) -> Log:
    """Read a file of rows; one that is not there has none.

    Raises:
        UserError: The file cannot be read at all.
    """
    kind, rows, odd, lines = file.stem, list[Row](), list[tuple[int, str]](), 0
    for count, line in enumerate(_lines_of(file), start=1):
        if not line.strip():
            continue
        lines, row = lines + 1, parse_row(line)
        wrong = "is torn, or no JSON object" if row is None else wrong_key(kind, row)
        if row is None or wrong:
            odd.append((count, wrong))
        else:
            rows.append(row)
    return Log(file, without_left(kind, rows), odd, lines)


def rows_of(file: Path, say: Callable[[str], None] | None = None) -> list[Row]:
    """The rows of a file; what is left out of them is said, by default once, on standard error.

    Raises:
        UserError: The file cannot be read at all.
    """
    log = read_log(file)
    if log.remark:
        (say or _warn)(f"WARNING: {log.remark}")
    return log.rows


def read_lines(file: Path) -> list[Row]:
    """Every JSON object in a file of lines, whatever keys it has; what is none is passed over.

    Raises:
        UserError: The file cannot be read at all.
    """
    return [row for line in _lines_of(file) if (row := parse_row(line)) is not None]


def without_left(kind: str, rows: list[Row]) -> list[Row]:
    """The rows without those of steps that the run made again later, in case they could not be taken out of the file.

    Of results, only the run's own are made again.
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


def _lines_of(file: Path) -> list[bytes]:
    try:
        return file.read_bytes().split(b"\n") if file.is_file() else []
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error


def wrong_key(kind: str, row: Row) -> str:
    """What is wrong with a row's keys; empty if nothing is."""
    for key, right in NEEDED.get(kind, {}).items():
        if key not in row:
            return f"has no {key}"
        if not right(row[key]):
            return f"has {_in_short(row[key])} as {key}"
    for key, right in OTHERS.get(kind, {}).items():
        if key in row and not right(row[key]):
            return f"has {_in_short(row[key])} as {key}"
    return ""


def _in_short(value: Any) -> str:
    return "null" if value is None else ascii(value)[:40] if isinstance(value, str) else f"{type(value).__name__}"


def _warn(sentence: str) -> None:
    if sentence not in _said:
        _said.add(sentence)
        with suppress(OSError):  # standard error may be a file on a disk that is full
            say(sentence)
