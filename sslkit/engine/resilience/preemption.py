"""Stopping on request. A signal or the time limit only sets a flag; the loop sees it, saves once, and ends.

Schedulers send SIGTERM or SIGUSR1 (Slurm) before they take a machine away, a person sends SIGINT. All three mean the
same here. A second signal, half a second later or more, ends the process at once. The first process answers each on
standard error at once.
"""

import ctypes
import math
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

SAME_SECONDS = 0.5  # signals within this time count as one: the terminal and the launcher may both send it
PR_SET_PDEATHSIG = 1  # of Linux's prctl
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STEP, EVALUATION = "this step", "the evaluation and a step"
CLEAR_LINE, SHOW_CURSOR = "\r\x1b[2K", "\x1b[?25h"


class StopRequest:
    """A context manager that listens for signals, on the main thread only, and watches the time limit (0: none).

    A signal that the parent process ignores, as a shell does with SIGINT for background jobs, stays ignored.
    """

    def __init__(self, max_hours: float) -> None:
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else math.inf
        self.max_hours = max_hours
        self.received, self.received_at = "", 0.0
        self.finishing = "the start and a step"  # what is done before the run is saved
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
            answer(f"stopped without saving{SHOW_CURSOR if os.isatty(2) else ''}")
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.received:
            self.received, self.received_at = signal.Signals(number).name, now
            if number == signal.SIGINT:
                opening, again = "", "press again to stop"
            else:
                opening, again = f"{self.received}: ", "a second signal stops"
            answer(f"{opening}finishing {self.finishing}, then saving; {again} without saving")


def answer(message: str) -> None:
    """Write a line on standard error from a signal handler, on the first process.

    Not through Python's buffers, which the interrupted code may be using.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    with suppress(OSError):
        # On a terminal the line takes the place of the progress line, which is drawn again below it.
        os.write(2, f"{CLEAR_LINE if os.isatty(2) else ''}sslkit: {message}\n".encode())


def stop_with_launcher() -> None:
    """Ask the kernel to send SIGTERM to this process when its launcher ends, for whatever reason.

    A signal that torchrun does not handle, such as Slurm's SIGUSR1, ends it and leaves its processes running.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
