"""Which sample each data worker is working on, in shared memory, so that messages about dead workers can name it."""

import multiprocessing
import os
import time
from typing import Any, NamedTuple

from torch.utils.data import get_worker_info

FIELDS = 3  # per worker: process id, sample (IDLE between samples), time at which it began
IDLE = -1.0


class WorkerStatus(NamedTuple):
    """The last status of a worker."""

    pid: int
    sample: int | None  # index of the sample it is working on
    seconds: float  # since the status was written


class StatusBoard:
    """The status of each worker of one loader, in memory that they share with this process."""

    def __init__(self, workers: int) -> None:
        # Without workers no shared memory is needed, which may be read-only.
        self.values: Any = multiprocessing.RawArray("d", FIELDS * workers) if workers else []

    def write(self, sample: float = IDLE) -> None:
        """Record that this worker begins a sample, or that it is idle."""
        worker = get_worker_info()
        if worker is not None:
            first = FIELDS * worker.id
            self.values[first : first + FIELDS] = [float(os.getpid()), sample, time.monotonic()]

    def read(self) -> list[WorkerStatus]:
        """The status of every worker that has begun a sample."""
        now, values = time.monotonic(), list(self.values)
        rows = [values[first : first + FIELDS] for first in range(0, len(values), FIELDS)]
        return [
            WorkerStatus(int(pid), None if sample == IDLE else int(sample), now - since)
            for pid, sample, since in rows
            if pid
        ]
