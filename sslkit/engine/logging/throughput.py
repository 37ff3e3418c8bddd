"""How fast training goes, and which share of the time it waits for data."""

import time
from collections.abc import Iterable, Iterator

from sslkit.data.batch import Batch


class ThroughputMeter:
    """Measures images per second and the share of time spent waiting for data, over a window of steps."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Start a new window, so that evaluation and saving do not count."""
        self.started, self.waited, self.steps = time.monotonic(), 0.0, 0

    def timed(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the loader's batches, one a step, and time the wait for each."""
        batches = iter(loader)
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - asked
            if batch is None:
                return
            self.steps += 1
            yield batch

    def read(self) -> tuple[float, float]:
        """Images per second and share of time spent waiting in this window; starts a new one."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        rates = self.steps * self.batch_size / seconds, self.waited / seconds
        self.restart()
        return rates
