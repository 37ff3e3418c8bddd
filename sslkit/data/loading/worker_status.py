"""A board on which every loader worker keeps its process id and the sample it is at, for the day it dies."""

import multiprocessing
import os
import time
from dataclasses import dataclass
from typing import Any

from torch.utils.data import get_worker_info

WORDS = 3  # of a worker: its process id, the sample it is at (IDLE between samples), since when
IDLE = -1.0


@dataclass(frozen=True)
class Post:
    """What a worker wrote last.

    Attributes:
        pid: Its process id.
        sample: The position in the source it is at, or None.
        seconds: For how long.
    """

    pid: int
    sample: int | None
    seconds: float


class Posts:
    """Memory shared with the workers of one loader."""

    def __init__(self, workers: int) -> None:
        # Without workers it needs no shared memory, which may be read-only.
        self.words: Any = multiprocessing.RawArray("d", WORDS * workers) if workers else []

    def begin(self, sample: int) -> None:
        """Called by a worker before it touches a sample."""
        self._write(float(sample))

    def end(self) -> None:
        """Called by a worker when the sample is done."""
        self._write(IDLE)

    def _write(self, sample: float) -> None:
        worker = get_worker_info()
        if worker is not None:
            first = WORDS * worker.id
            self.words[first : first + WORDS] = [float(os.getpid()), sample, time.monotonic()]

    def read(self) -> list[Post]:
        """What every worker that has begun a sample wrote last."""
        now, words = time.monotonic(), list(self.words)
        rows = [words[first : first + WORDS] for first in range(0, len(words), WORDS)]
        return [
            Post(int(pid), None if sample == IDLE else int(sample), now - since) for pid, sample, since in rows if pid
        ]
