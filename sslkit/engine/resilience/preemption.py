"""Stopping on request. A signal or the time limit only sets a flag; the loop sees it, saves once, and ends.

Schedulers send SIGTERM or SIGUSR1 (Slurm) before they take a machine away, a person sends SIGINT. All three mean the
same here. A second signal, half a second later or more, ends the process at once.
"""

import ctypes
import math
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

SAME_SECONDS = 0.5  # signals within this time count as one: the terminal and the launcher may both send it
PR_SET_PDEATHSIG = 1  # of Linux's prctl
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """A context manager that listens for signals, on the main thread only, and watches the time limit (0: none).

    A signal that the parent process ignores, as a shell does with SIGINT for background jobs, stays ignored.
    """

    def __init__(self, max_hours: float) -> None:
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else math.inf
        self.max_hours = max_hours
        self.received, self.received_at = "", 0.0
        self.previous_handlers: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str:
        """Why to stop; empty as long as there is no request."""
        if self.received:
            return self.received
        return f"[train] max_hours = {self.max_hours:g}" if time.monotonic() > self.deadline else ""

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.previous_handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers.clear()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and now - self.received_at > SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.received:
            self.received, self.received_at = signal.Signals(number).name, now


def stop_with_launcher() -> None:
    """Ask the kernel to send SIGTERM to this process when its launcher ends, for whatever reason.

    A signal that torchrun does not handle, such as Slurm's SIGUSR1, ends it and leaves its processes running.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
