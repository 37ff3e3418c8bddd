"""Stopping on request. A signal or the clock raises a flag and no more; the loop sees it, agrees, saves once, and ends.

Schedulers differ in what they send before they take a machine away: SIGTERM, SIGUSR1 (Slurm), or SIGINT from a person.
All three mean the same here. A second one, half a second later or more, means "now".
"""

import ctypes
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from sslkit.files.atomic import replace_text

RESUMABLE = 75  # exit code of a run that was stopped and can go on: EX_TEMPFAIL of sysexits.h
MARKER = "PREEMPTED"  # file in the run folder, for scripts: launchers hide exit codes
SAME = 0.5  # seconds in which signals are one: a terminal's and the launcher's, or one for each thread of its
PR_SET_PDEATHSIG = 1  # of Linux's prctl
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Listens, while it is entered, for signals, and watches the clock.

    Signals reach the main thread only; in another one there is just the clock. One that the parent had ignored, as a
    shell does with SIGINT for jobs in the background, stays ignored.

    Args:
        max_hours: The run's budget from now on; 0 has none.
    """

    def __init__(self, max_hours: float) -> None:
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else math.inf
        self.max_hours = max_hours
        self.heard, self.heard_at = "", 0.0
        self.before: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str:
        """Why to stop; empty as long as there is no reason."""
        if self.heard:
            return self.heard
        return f"[train] max_hours = {self.max_hours:g} are over" if time.monotonic() > self.deadline else ""

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before.clear()

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.heard and now - self.heard_at > SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.heard:
            self.heard, self.heard_at = signal.Signals(number).name, now


def die_with_launcher() -> None:
    """Ask the kernel for SIGTERM when the launcher that started this process ends, however it ends.

    torchrun dies of a signal that it was not told to handle, such as Slurm's SIGUSR1, and leaves its processes alone.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def leave_marker(folder: Path, step: int, reason: str) -> None:
    """Tell scripts that the run stopped on request after ``step`` updates, and may be started again.

    Raises:
        OSError: There is no room even for that.
    """
    replace_text(folder / MARKER, f"step {step}: {reason}\n")


def remove_marker(folder: Path) -> None:
    """The run goes on."""
    (folder / MARKER).unlink(missing_ok=True)
