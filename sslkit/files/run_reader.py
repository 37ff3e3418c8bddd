"""Read a run folder: versions, logs, newest checkpoint, stop marker, lock. It writes nothing, and needs no PyTorch."""

import fcntl
import json
import os
import re
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path

from sslkit.errors import UserError, check_path
from sslkit.files.jsonl_reader import Row, open_regular, rows_of
from sslkit.terminal import sanitize

RECIPE, LOCK = "recipe.toml", ".lock"
STOP_MARKER = "PREEMPTED"  # for scripts, since launchers hide exit codes
GROWING_FILES = ("metrics.jsonl", "results.jsonl", "diagnostics.jsonl", "checkpoints/latest", LOCK)
MAX_TEXT = 4096  # bytes of small text files that are read


class RunReader:
    """Reads the files of a run folder. Raises `UserError` if its path is refused by `sslkit.errors.check_path`."""

    def __init__(self, folder: Path) -> None:
        check_path(folder, "RUN")
        self.folder = folder

    @property
    def is_run(self) -> bool:
        """Whether the folder holds a run: it has a recipe."""
        return (self.folder / RECIPE).is_file()

    def check(self) -> None:
        """Raise `UserError` if the folder is not a run."""
        if not self.is_run:
            raise UserError(f"{self.folder}: not a run folder (no {RECIPE}); give the --output folder of a run")

    def rows(self, log: str) -> list[Row]:
        """Valid rows of ``metrics``, ``results`` or ``diagnostics``; a missing file has none."""
        return rows_of(self.folder / f"{log}.jsonl")

    def versions(self) -> dict[str, str]:
        """What the comments at the top of the recipe record: versions, platform, number of processes."""
        header: dict[str, str] = {}
        for line in (self.folder / RECIPE).read_text(encoding="utf-8").splitlines():
            found = re.fullmatch(r"# (\S+) (.+)", line)
            if not found:
                break
            header[found[1]] = found[2]
        return header

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None if there is none, or ``checkpoints/latest`` does not name one."""
        digits = self._first_line("checkpoints/latest").removeprefix("step-")
        return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None

    def stop_marker(self) -> str:
        """Step and reason if the run was stopped on request; else empty."""
        return self._first_line(STOP_MARKER)

    def idle_seconds(self) -> float:
        """Seconds since the run last wrote a file."""
        times = [file.lstat().st_mtime for name in GROWING_FILES if (file := self.folder / name).exists()]
        return max(time.time() - max(times, default=time.time()), 0.0)

    def lock(self) -> tuple[bool, str]:
        """Whether a process holds the folder's lock, and "process PID on HOST" of the last holder (empty if none).

        The kernel is asked who holds the lock. The lock is never taken, so a run that starts now is not refused. Must
        not be called in the training process: closing the file would release its lock.
        """
        holder = "a process"
        try:
            with open_regular(self.folder / LOCK) as descriptor:
                holder = lock_holder(descriptor) or holder
                return _is_locked(descriptor), holder
        except FileNotFoundError:
            return False, ""
        except OSError:  # a file system without locks: the run removes the file at its end, unless it is killed
            return True, holder

    def _first_line(self, name: str) -> str:
        try:
            text = read_regular(self.folder / name, MAX_TEXT).decode(errors="replace")
        except OSError:
            return ""
        return sanitize(text.strip().partition("\n")[0])


def read_regular(file: Path, max_bytes: int) -> bytes:
    """The first ``max_bytes`` bytes of a file. Raises `OSError` if it is missing or not a regular file."""
    with open_regular(file) as descriptor:
        return os.pread(descriptor, max_bytes, 0)


def lock_holder(descriptor: int) -> str:
    """The text "process PID on HOST" from a lock file; empty if it names no process."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        entry = json.loads(os.pread(descriptor, MAX_TEXT, 0))
        return f"process {int(entry['pid'])} on {sanitize(str(entry['host'])[:100])}"
    return ""


def _is_locked(descriptor: int) -> bool:
    """Whether any process holds an exclusive lock on the file, by the kernel's ``struct flock``."""
    on_mac = sys.platform == "darwin"
    layout = "qqihh" if on_mac else "hhqqi"
    request = (0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET) if on_mac else (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    answer = struct.unpack(layout, fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(layout, *request)))
    return bool(answer[3 if on_mac else 0] != fcntl.F_UNLCK)
