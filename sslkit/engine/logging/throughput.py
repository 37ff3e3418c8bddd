"""How fast it goes, and how much of that is waiting for data."""

import time
from collections.abc import Iterable, Iterator

from sslkit.data.batch import Batch


class StepClock:
    """Images per second and the share of time spent waiting for data, since the last line of metrics."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Forget what was measured, so that evaluation and saving do not count."""
        self.started, self.waited, self.steps = time.monotonic(), 0.0, 0

    def waiting(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The loader's batches, the wait for each on the clock."""
        batches = iter(loader)
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def finish_step(self) -> None:
        """Count a step."""
        self.steps += 1

    def window(self) -> tuple[float, float]:
        """Images per second and share of waiting since the last call; starts a new window."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        figures = self.steps * self.batch_size / seconds, self.waited / seconds
        self.restart()
        return figures
