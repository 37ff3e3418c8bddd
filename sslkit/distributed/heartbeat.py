"""Heartbeats that find the process that has died or hangs.

The error of a failed collective does not say which process caused it. So every process writes once a second what it is
doing to the key-value store of the launcher, from a thread of its own: a stuck process still sends heartbeats, a dead
or frozen one does not.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from sslkit.distributed.collectives import rank, running_collective, world_size
from sslkit.errors import RunError, first_line
from sslkit.terminal import print_message

INTERVAL = 1.0
WAITING, TIMED_OUT = "in the collective ", "timed out waiting for others"
NO_TIMEOUT = ("starting", "evaluating", "saving")  # activities that may take any time


class Heartbeat:
    """A context manager that sends heartbeats; none on a single process. A step may take ``timeout`` seconds."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.step, self.doing, self.since = 0, "starting", time.monotonic()
        self.ended = threading.Event()
        self.count, self.timed_out = 0, False
        self.store: Any = None
        self.thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def at(self, step: int, doing: str) -> None:
        """Record the step and the current activity, which the next heartbeats report."""
        self.step, self.doing, self.since = step, doing, time.monotonic()

    def __enter__(self) -> "Heartbeat":
        if world_size() > 1:
            self.store = dist.distributed_c10d._get_default_store().clone()
            self.thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self.store is None:
            return
        if error is not None and not is_others_fault(error):
            self._send(f"stopped by {type(error).__name__}: {first_line(error, 250)}")
        self.ended.set()
        self.thread.join(timeout=5.0)

    def blame(self, error: BaseException | None = None) -> RunError:
        """Find the process that made a collective hang, or fail with ``error``; takes a few heartbeats."""
        where = self._doing()
        reason = f" ({str(error).splitlines()[0][-160:]})" if error else ""
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
        found = [_find_problem(other, before[other], after[other], self.step) for other in range(world_size())]
        problems = [problem for other, problem in enumerate(found) if problem and other != rank()]
        text = "; ".join(problems[:8]) or f"no process is dead or behind{reason}"
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
        except (RuntimeError, OSError):
            self.ended.set()  # the launcher has ended: the collectives will fail too

    def _beat(self) -> None:
        self._send(self.doing)
        while not self.ended.wait(INTERVAL):
            self._send(self._doing())
            if self.doing not in NO_TIMEOUT and time.monotonic() - self.since > self.timeout + 5 * INTERVAL:
                self._abort()

    def _abort(self) -> None:
        """End the process from this thread, because the main thread hangs."""
        print_message(self.blame())
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(1)


def is_others_fault(error: BaseException) -> bool:
    """Whether an exception comes from a collective that failed because of another process."""
    # gloo raises plain RuntimeErrors
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _find_problem(other: int, before: dict[str, Any], after: dict[str, Any], step: int) -> str:
    """What is wrong with another process, by two of its heartbeats; empty if nothing is."""
    if not after:
        return f"process {other} has sent no heartbeat"
    doing = after["doing"]
    if doing.startswith("stopped by"):
        return f"process {other} {doing} at step {after['step']}"
    if before and after["count"] == before["count"]:
        return f"process {other} is dead or frozen; its last heartbeat was at step {after['step']}, {doing}"
    if after["step"] < step or not doing.startswith((WAITING, TIMED_OUT)):
        return f"process {other} is alive at step {after['step']}, {doing}"
    return ""
