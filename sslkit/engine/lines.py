"""Files of JSON lines that grow while a run trains, and survive a disk that is full for a while."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sslkit.durable import replace_text
from sslkit.errors import UserError

OWED = 100_000  # lines that wait for room at the most; older ones are given up first


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
            self.say(f"WARNING: {self.file}: {error.strerror or error}; {len(self.owed)} line(s) wait for room")


def append_text(file: Path, text: str) -> None:
    """Append whole lines or nothing; a line that a crash left half-written before them is ended first.

    Raises:
        OSError: They could not be written; the file is as it was.
    """
    with file.open("a+b", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(size - 1)
            text = text if stream.read(1) == b"\n" else "\n" + text
        try:
            left = memoryview(text.encode())
            while left:
                left = left[stream.write(left) :]
        except OSError:
            os.truncate(file, size)
            raise


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; one that was torn by a crash is left out.

    Raises:
        UserError: A line holds something else than an object.
    """
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(row, dict):
            raise UserError(f"{file} line {number}: must be a JSON object, not {row!r:.40}")
        rows.append(row)
    return rows


def step_of(row: dict[str, Any]) -> float:
    """A row's step; 0 where it has none that is a number."""
    step = row.get("step")
    return step if isinstance(step, int | float) else 0


def keep_until(file: Path, step: int, only_by: str | None = None) -> float:
    """Drop lines of steps after ``step``, so that a resumed run repeats none.

    Args:
        file: JSONL; it need not be there.
        step: The last that stays.
        only_by: Leave lines alone whose ``by`` is another.

    Returns:
        The latest step of the lines that this is about, before any was dropped; 0 if there is none.
    """
    if not file.is_file():
        return 0
    rows = read_lines(file)
    others = [only_by is not None and row.get("by") != only_by for row in rows]
    kept = [row for row, other in zip(rows, others, strict=True) if other or step_of(row) <= step]
    replace_text(file, "".join(json.dumps(row) + "\n" for row in kept))
    return max((step_of(row) for row, other in zip(rows, others, strict=True) if not other), default=0)


def settle_all(files: Iterable[Lines]) -> None:
    """A last try to write what is owed, at the end of a run."""
    for file in files:
        file.settle()
