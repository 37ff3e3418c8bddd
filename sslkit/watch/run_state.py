"""How a run is, from what its folder tells: whether its process lives, stopped on request, is done or was killed."""

import fcntl
import json
import os
import struct
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sslkit.durations import duration
from sslkit.terminal import printed
from sslkit.watch.tail import plain_file, read_plain

# sslkit.engine.run_folder.lock and sslkit.engine.resilience.preemption have these too, behind heavy imports.
LOCK, MARKER = ".lock", "PREEMPTED"
FILES = ("metrics.jsonl", "results.jsonl", "diagnostics.jsonl", "checkpoints/latest", LOCK)
QUIET_SECONDS, QUIET_LINES = 60.0, 20.0
MAX_BYTES = 4096


@dataclass(frozen=True)
class State:
    """How a run is.

    Attributes:
        word: ``waiting`` for it to begin, ``starting``, ``running``, ``silent`` for too long, ``stopped`` on request,
            ``done``, ``killed``, or ``ended`` by an error.
        sentence: The same for people.
    """

    word: str
    sentence: str


def state_of(folder: Path, step: int, last_step: int, seconds_a_line: float) -> State:
    """Look at lock, marker and files.

    Args:
        folder: Run folder.
        step: Of the newest line of metrics; 0 if there is none.
        last_step: Of the run; 0 if it is not known.
        seconds_a_line: Usual time between two lines of metrics; 0 if it is not known.
    """
    held, holder = lock_of(folder)
    if held:
        quiet = quiet_seconds(folder)
        if quiet > max(QUIET_SECONDS, QUIET_LINES * seconds_a_line):
            usual = f", usually every {duration(seconds_a_line)}" if seconds_a_line >= 1 else ""
            return State("silent", f"{holder} wrote nothing for {duration(quiet)}{usual}: it evaluates, waits or hangs")
        return State("running", holder) if step else State("starting", f"{holder}, no line of metrics yet")
    if marker := read_text(folder / MARKER):
        return State("stopped", f"stopped at {marker}; the same command continues")
    saved = newest_checkpoint(folder)
    if last_step and saved >= last_step:
        return State("done", f"all {last_step} steps made and saved")
    if holder:
        return State("killed", f"{holder} is gone without a word; the same command continues from step {saved}")
    if not (folder / "recipe.toml").is_file():
        return State("waiting", "no run here yet")
    return State("ended", f"no process trains here; the same command continues from step {saved}")


def lock_of(folder: Path) -> tuple[bool, str]:
    """Whether a process holds the folder, and who wrote the lock last, in words; empty if nobody did.

    The kernel is asked who holds the lock; it is never taken, for that could refuse a run that starts meanwhile. Not
    to be called by the training process itself: closing the file would drop its lock.
    """
    holder = "a process"
    try:
        with plain_file(folder / LOCK) as descriptor:
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(os.pread(descriptor, MAX_BYTES, 0))
                holder = f"process {int(entry['pid'])} on {printed(str(entry['host'])[:100])}"
            return _is_locked(descriptor), holder
    except FileNotFoundError:
        return False, ""
    except OSError:  # a file system without locks: the file goes with the run, unless that is killed
        return True, holder


def _is_locked(descriptor: int) -> bool:
    """Whether anybody holds an exclusive lock on the file, by the kernel's ``struct flock``."""
    on_mac = sys.platform == "darwin"
    layout = "qqihh" if on_mac else "hhqqi"
    question = (0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET) if on_mac else (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    answer = struct.unpack(layout, fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(layout, *question)))
    return bool(answer[3 if on_mac else 0] != fcntl.F_UNLCK)


def quiet_seconds(folder: Path) -> float:
    """How long ago the run last wrote anything."""
    times = [file.lstat().st_mtime for name in FILES if (file := folder / name).exists()]
    return max(time.time() - max(times, default=time.time()), 0.0)


def newest_checkpoint(folder: Path) -> int:
    """Its step, as ``checkpoints/latest`` has it; 0 if there is none."""
    digits = read_text(folder / "checkpoints" / "latest").removeprefix("step-")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else 0


def read_text(file: Path) -> str:
    """The first line of a small file; empty if there is none."""
    try:
        return printed(read_plain(file, MAX_BYTES).decode(errors="replace").strip().partition("\n")[0])
    except OSError:
        return ""
