"""How fast training goes, and which share of the time it waits for data."""

import time
from collections import deque
from collections.abc import Iterable, Iterator

import torch

from sslkit.data.batch import Batch
from sslkit.engine.cost.device_meter import DeviceMeter

RECENT = 50  # steps


class ThroughputMeter:
    """Measures images per second and the share of time spent waiting for data, over a window of steps.

    ``device`` measures the device over the same steps; by default nothing.
    """

    def __init__(self, batch_size: int, device: DeviceMeter | None = None) -> None:
        self.batch_size = batch_size
        self.device = device or DeviceMeter(torch.device("cpu"))
        self.recent: deque[float] = deque(maxlen=RECENT)  # seconds of the latest steps
        self.only_first = True
        self.count, self.paused = 0, 0.0  # steps, and seconds of evaluations and saving between them
        self.started = self.step_started = time.monotonic()
        self.waited, self.steps = 0.0, 0

    def restart(self, *, once: bool = False) -> None:
        """Start a new window, so that evaluation and saving do not count; ``once`` what will not happen again."""
        self.started, self.waited, self.steps = time.monotonic(), 0.0, 0
        self.paused += 0.0 if once else self.started - self.step_started
        self.step_started = self.started
        self.device.restart()

    def end_step(self) -> float:
        """End a step; returns images per second of the latest ones, in the same window or not.

        The first step is slower than all others, as workers start and kernels are chosen. It counts as long as there is
        no other.
        """
        if self.recent and self.only_first:
            self.recent.clear()
            self.only_first = False
        now = time.monotonic()
        self.recent.append(now - self.step_started)
        self.step_started = now
        self.count += 1
        return self.batch_size * len(self.recent) / max(sum(self.recent), 1e-9)

    def seconds_left(self, steps: int) -> float:
        """Time of this many steps at the latest speed, with as much evaluation and saving a step as so far."""
        return steps * (sum(self.recent) / max(len(self.recent), 1) + self.paused / max(self.count, 1))

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
            self.device.start_step()
            yield batch
            self.device.end_step()

    def fields(self) -> dict[str, float]:
        """The fields of a line of metrics on speed and device, for this window; starts a new one."""
        rate, waiting = self.read()
        return {"images_per_second": rate, "data_wait": waiting, **self.device.read(rate / self.batch_size)}

    def read(self) -> tuple[float, float]:
        """Images per second and share of time spent waiting in this window; starts a new one."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        rates = self.steps * self.batch_size / seconds, self.waited / seconds
        self.started, self.waited, self.steps = time.monotonic(), 0.0, 0
        return rates
