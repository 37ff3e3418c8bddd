"""Who is dead, who hangs: every process tells the others once a second that it lives, and what it is doing.

A collective that fails says only that some connection closed or some time was up. Beats say whose. They go through
the launcher's key-value store, on a thread and a connection of their own, so that a stuck process still beats and a
dead or frozen one does not.
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
from sslkit.errors import RunError
from sslkit.terminal import print_message

INTERVAL = 1.0
WAITING, IN_VAIN = "in the collective ", "waiting for others in vain"
PATIENT = ("starting", "evaluating", "saving")  # what may take longer than any timeout


class Heartbeat:
    """Beats while it is entered; on one process it only keeps the time.

    Args:
        timeout: Seconds in which a step must make progress.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.step, self.doing, self.since = 0, "starting", time.monotonic()
        self.ended = threading.Event()
        self.count, self.in_vain = 0, False
        self.store: Any = None
        self.thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def at(self, step: int, doing: str) -> None:
        """Say what this process does from now on."""
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
            self._tell(f"stopped by {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
        self.ended.set()
        self.thread.join(timeout=5.0)

    def blame(self, error: BaseException | None = None) -> RunError:
        """Find out whose fault a failed or endless collective is; takes a few beats.

        Args:
            error: What the collective raised, if it did.
        """
        where = self._doing()
        reason = f" ({str(error).splitlines()[0][-160:]})" if error else ""
        opening = f"process {rank()} cannot go on at step {self.step}, {where}"
        self.in_vain = True
        try:
            before = self._beats()
            time.sleep(2.5 * INTERVAL)
            after = self._beats()
        except (RuntimeError, OSError):
            return RunError(f"{opening}: the launcher's store is gone, and with it process 0 or its machine{reason}")
        sentences = [
            sentence
            for other in range(world_size())
            if other != rank() and (sentence := _suspicion(other, before[other], after[other], self.step))
        ]
        said = "; ".join(sentences[:8]) or f"no process is dead or behind{reason}"
        return RunError(f"{opening}: {said}. The same command continues from the last checkpoint")

    def _beats(self) -> list[dict[str, Any]]:
        keys = [f"beat/{other}" for other in range(world_size())]
        return [json.loads(self.store.get(key)) if self.store.check([key]) else {} for key in keys]

    def _doing(self) -> str:
        if self.in_vain:
            return IN_VAIN
        return f"{WAITING}{running_collective()}" if running_collective() else self.doing

    def _tell(self, doing: str) -> None:
        self.count += 1
        beat = {"count": self.count, "step": self.step, "doing": doing}
        try:
            self.store.set(f"beat/{rank()}", json.dumps(beat))
        except (RuntimeError, OSError):
            self.ended.set()  # no store, no launcher: the collectives will fail too

    def _beat(self) -> None:
        self._tell(self.doing)
        while not self.ended.wait(INTERVAL):
            self._tell(self._doing())
            if self.doing not in PATIENT and time.monotonic() - self.since > self.timeout + 5 * INTERVAL:
                self._give_up()

    def _give_up(self) -> None:
        """The main thread neither goes on nor fails: end this process from here."""
        print_message(self.blame())
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(1)


def is_others_fault(error: BaseException) -> bool:
    """Whether an exception is a collective's that could not be finished: gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _suspicion(other: int, before: dict[str, Any], after: dict[str, Any], step: int) -> str:
    """What is suspicious about a process; empty if nothing is."""
    if not after:
        return f"process {other} was never heard of"
    doing = after["doing"]
    if doing.startswith("stopped by"):
        return f"process {other} {doing} at step {after['step']}"
    if before and after["count"] == before["count"]:
        return f"process {other} is dead or frozen; last heard of at step {after['step']}, {doing}"
    if after["step"] < step or not doing.startswith((WAITING, IN_VAIN)):
        return f"process {other} lives and is at step {after['step']}, {doing}"
    return ""
