"""Heartbeats that find the process that has died or hangs.

The error of a failed collective does not say which process caused it. So every process writes once a second what it is
doing to the key-value store of the launcher, from a thread of its own: a stuck process still sends heartbeats, a dead
or frozen one does not.

NCCL does not notice that another process has stopped, and aborts a process that has waited too long without saying
why. So the thread also ends the process if another one has stopped, or the store has, and if a step takes too long.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from sslkit.distributed.collectives import rank, running_collective, world_size
from sslkit.distributed.failures import (
    HANGS,
    NOBODY,
    STOPPED,
    TIMED_OUT,
    WAITING,
    describe_failure,
    find_problem,
    is_others_fault,
)
from sslkit.errors import RunError, first_line
from sslkit.terminal import print_message

INTERVAL = 1.0
GRACE = 10.0  # seconds that the main thread has to find out itself that another process has stopped
NO_TIMEOUT = ("starting", "evaluating", "saving")  # activities that may take any time
ONE_STOPPED = "one has stopped"  # key in the store


class Heartbeat:
    """A context manager that sends heartbeats; none on a single process. A step may take ``timeout`` seconds."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.step, self.doing, self.since = 0, "starting", time.monotonic()
        self.ended = threading.Event()
        self.count, self.timed_out = 0, False
        self.doomed_at: float | None = None  # when it was seen that another process has stopped, or the store
        self.store: Any = None
        self.blocking = True  # the backend's calls return when the collective is done
        self.thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def at(self, step: int, doing: str) -> None:
        """Record the step and the current activity, which the next heartbeats report."""
        self.step, self.doing, self.since = step, doing, time.monotonic()

    def __enter__(self) -> "Heartbeat":
        if world_size() > 1:
            self.store = dist.distributed_c10d._get_default_store().clone()
            self.blocking = "nccl" not in dist.get_backend()
            self.thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self.store is None:
            return
        self.ended.set()
        self.thread.join(timeout=5.0)
        if error is not None and not is_others_fault(error):  # after the last heartbeat of the thread
            self._send(f"{STOPPED}{type(error).__name__}: {first_line(error, 250)}")
            self._tell_all()

    def blame(self, error: BaseException | None = None) -> RunError:
        """Find the process that made a collective hang, or fail with ``error``; takes a few heartbeats."""
        where = self._doing()
        reason = f" ({describe_failure(error)})" if error else ""
        own = {"step": self.step, "doing": self.doing}
        opening = f"process {rank()} cannot continue at step {self.step}, {where}"
        self.timed_out = True
        try:
            before = self._read_beats()
            time.sleep(2.5 * INTERVAL)
            after = self._read_beats()
        except (RuntimeError, OSError):
            return RunError(
                f"{opening}: the store of the launcher does not answer; process 0 or its machine has ended{reason}"
            )
        others = [other for other in range(world_size()) if other != rank()]
        found = [find_problem(other, before[other], after[other], own, blocking=self.blocking) for other in others]
        nobody = f"{NOBODY}{reason}" if self.blocking or error else HANGS
        text = "; ".join(list(filter(None, found))[:8]) or nobody
        return RunError(f"{opening}: {text}. The same command continues from the last checkpoint")

    def _read_beats(self) -> list[dict[str, Any]]:
        keys = [f"beat/{other}" for other in range(world_size())]
        return [json.loads(self.store.get(key)) if self.store.check([key]) else {} for key in keys]

    def _doing(self) -> str:
        if self.timed_out:
            return TIMED_OUT
        return f"{WAITING}{running_collective()}" if running_collective() else self.doing

    def _send(self, doing: str) -> None:
        self.count += 1
        beat = {"count": self.count, "step": self.step, "doing": doing}
        try:
            self.store.set(f"beat/{rank()}", json.dumps(beat))
            doomed = self.store.check([ONE_STOPPED])
        except (RuntimeError, OSError):  # the launcher has ended: gloo's collectives will fail too
            doomed = True
            if self.blocking:
                self.ended.set()
        if doomed and self.doomed_at is None:
            self.doomed_at = time.monotonic()

    def _tell_all(self) -> None:
        with suppress(RuntimeError, OSError):
            self.store.set(ONE_STOPPED, "")

    def _beat(self) -> None:
        self._send(self.doing)
        while not self.ended.wait(INTERVAL):
            self._send(self._doing())
            if not self.timed_out and self._must_end():
                self._abort()

    def _must_end(self) -> bool:
        """Whether the main thread hangs, or the others cannot go on; a save is let finish."""
        now = time.monotonic()
        is_late = now - self.since > self.timeout + 5 * INTERVAL
        if self.doomed_at is not None and now - self.doomed_at > GRACE and (self.doing != "saving" or is_late):
            return True
        return is_late and self.doing not in NO_TIMEOUT

    def _abort(self) -> None:
        """End the process from this thread, because the main thread hangs."""
        print_message(self.blame())
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(1)
