"""The loader of a run, which replaces data workers that die or hang."""

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.batch import Batch
from sslkit.data.loading.loader import make_loader
from sslkit.data.loading.shared_memory import prefetch_of, shortage
from sslkit.data.loading.worker_status import StatusBoard, WorkerStatus
from sslkit.data.order.sampler import GlobalBatchSampler
from sslkit.data.sources.image_source import ImageSource
from sslkit.errors import RunError
from sslkit.terminal import print_message

POLL = 5.0  # seconds between checks of the workers while waiting for a batch
DYING = 2.0  # seconds that a worker's exit may take after its connection is lost
RESTARTS = 2  # of the workers, without a batch in between


class TrainLoader:
    """Yields every batch of ``batches``. If a worker dies or hangs, new workers continue at the same step.

    A batch depends on its step only, so a restart costs time and changes nothing else. Without workers, an image that
    hangs blocks the run. Raises `UserError` if shared memory is too small for so many workers.

    Args:
        timeout: Seconds that a batch may take before its worker counts as hung; 0 waits forever.
        upload: Copies each batch to the device, such as an `Uploader`; None leaves batches in host memory.
        log_message: Called with one sentence after each restart. For the other arguments, see `make_loader`.
    """

    def __init__(
        self,
        source: ImageSource,
        pipeline: ViewPipeline,
        batches: GlobalBatchSampler,
        *,
        workers: int,
        pin_memory: bool,
        timeout: float,
        upload: Callable[[Batch], Batch] | None = None,
        log_message: Callable[[str], None] = print_message,
    ) -> None:
        self.source, self.batches, self.workers = source, batches, workers
        self.timeout, self.upload, self.log_message = timeout, upload, log_message
        self.make_loader = partial(make_loader, source, pipeline, workers=workers, pin_memory=pin_memory)
        local = batches.batch_size // batches.world_size
        self.batch_bytes = local * sum(pipeline.pixel_bytes * side * side for side in pipeline.sides)
        self.prefetch = prefetch_of(self.batch_bytes, workers) or 0

    def __iter__(self) -> Iterator[Batch]:
        return self._load() if self.upload is None else map(self.upload, self._load())

    def _load(self) -> Iterator[Batch]:
        if not self.workers:
            yield from self.make_loader(self.batches)
            return
        step, failures = self.batches.start_step, 0
        while step < self.batches.total_steps:
            pool = _WorkerPool(self, step)
            try:
                while step < self.batches.total_steps:
                    batch = pool.next_batch()
                    yield batch
                    step, failures = step + 1, 0
            except _WorkerLostError as error:
                failures += 1
                lost = f"step {step}, process {self.batches.rank}: {error}"
                if failures > RESTARTS:
                    raise RunError(f"{lost}, {failures} times in a row; the last checkpoint is intact") from None
                self.log_message(f"{lost}; the data workers are restarted from there")
            finally:
                pool.terminate()


class _WorkerLostError(Exception):
    """A worker died or hung. The message is a clause that names the worker and the image."""


class _WorkerPool:
    """The workers of one DataLoader."""

    def __init__(self, loader: TrainLoader, step: int) -> None:
        self.loader, self.hung = loader, ""
        self.status = StatusBoard(loader.workers)
        before = set(multiprocessing.active_children())
        batches, timeout = loader.batches.starting_at(step), min(POLL, loader.timeout or POLL)
        data_loader = loader.make_loader(batches, timeout=timeout, status=self.status, prefetch=loader.prefetch)
        self.batches = iter(data_loader)
        self.workers = set(multiprocessing.active_children()) - before
        if threading.current_thread() is threading.main_thread():
            # PyTorch's handler would raise in the middle of whatever runs, such as an optimizer step.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def next_batch(self) -> Batch:
        """The next batch. Raises `_WorkerLostError` if a worker died or hangs."""
        begun = time.monotonic()
        watchdog = threading.Timer(self.loader.timeout + 2 * POLL, self._kill_hung)
        watchdog.daemon = True
        if self.loader.timeout:
            watchdog.start()
        try:
            while True:
                try:
                    batch: Batch = next(self.batches)
                    return batch
                except (RuntimeError, OSError, EOFError) as error:
                    self._check_workers(error, time.monotonic() - begun)
        finally:
            watchdog.cancel()

    def _kill_hung(self) -> None:
        """Kill the workers if one stopped while it sent a batch; PyTorch would wait for the rest of it forever."""
        self.hung = self._hung_message()
        for worker in self.workers:
            worker.kill()

    def _check_workers(self, error: Exception, waited: float) -> None:
        """Raise if a worker is dead or hung or ``error`` is its own; return if a batch only takes long."""
        if self.hung:
            raise _WorkerLostError(self.hung)
        timed_out = "timed out" in str(error)
        statuses = self.status.read()
        for worker in self.workers:
            if not timed_out:
                worker.join(DYING / len(self.workers))  # its connection is lost shortly before it exits
            if not worker.is_alive():
                status = next((each for each in statuses if each.pid == worker.pid), None)
                raise _WorkerLostError(
                    f"a data worker (process id {worker.pid}) exited with code {worker.exitcode}"
                    f"{self._image(status)}; code -9 is the kernel's when memory runs out: set fewer [data] workers"
                )
        if not timed_out:
            raise error
        if self.loader.timeout and waited >= self.loader.timeout:
            raise _WorkerLostError(self._hung_message())

    def _hung_message(self) -> str:
        busy = (status for status in self.status.read() if status.sample is not None)
        longest = max(busy, key=lambda status: status.seconds, default=None)
        return (
            f"no batch within [data] worker_timeout = {self.loader.timeout:g} seconds, a data worker "
            f"hangs{self._image(longest)}{shortage(self.loader.batch_bytes)}"
        )

    def _image(self, status: WorkerStatus | None) -> str:
        if status is None or status.sample is None:
            return ""
        return f" at image {status.sample} ({self.loader.source.name(status.sample)})"

    def terminate(self) -> None:
        """Kill the workers, including those that no longer respond."""
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.join(POLL)  # a worker that waits for a lost disk exits when the disk responds
        del self.batches
