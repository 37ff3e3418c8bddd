"""The batches of a run, whatever becomes of the processes that make them."""

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.batch import Batch
from sslkit.data.loading.loader import GlobalBatches, make_loader
from sslkit.data.loading.shared_memory import prefetch_of, shortage
from sslkit.data.loading.worker_status import Post, Posts
from sslkit.data.sources.image_source import ImageSource
from sslkit.errors import RunError
from sslkit.terminal import print_message

POLL = 5.0  # seconds between looks at the workers while a batch is awaited
DYING = 2.0  # seconds
RESTARTS = 2  # of the loader, without a batch in between


class SteadyLoader:
    """Yields every batch of ``batches``. A dead or stuck worker ends its loader; another begins at the same step.

    A batch depends on its step alone, so a restart changes nothing but the time it takes.

    Args:
        source: Images.
        pipeline: Cuts the views.
        batches: Which samples, in which order.
        workers: Processes that read; with 0 there is none to lose, and an image that hangs hangs the run.
        pin_memory: Whether batches are copied to pinned pages.
        timeout: Seconds that a batch may take before its worker counts as stuck (0: for ever).
        say: Told, in a sentence, what happened.

    Raises:
        UserError: Shared memory is too small for as many workers.
    """

    def __init__(
        self,
        source: ImageSource,
        pipeline: ViewPipeline,
        batches: GlobalBatches,
        *,
        workers: int,
        pin_memory: bool,
        timeout: float,
        say: Callable[[str], None] = print_message,
    ) -> None:
        self.source, self.pipeline, self.batches = source, pipeline, batches
        self.workers, self.pin_memory, self.timeout, self.say = workers, pin_memory, timeout, say
        local = batches.batch_size // batches.world_size
        self.batch_bytes = local * sum(pipeline.pixel_bytes * side * side for side in pipeline.sides)
        self.prefetch = prefetch_of(self.batch_bytes, workers) or 0

    def __iter__(self) -> Iterator[Batch]:
        if not self.workers:
            yield from make_loader(self.source, self.pipeline, self.batches, workers=0, pin_memory=self.pin_memory)
            return
        step, lost = self.batches.start_step, 0
        while step < self.batches.total_steps:
            crew = _Crew(self, step)
            try:
                while step < self.batches.total_steps:
                    batch = crew.next_batch()
                    yield batch
                    step, lost = step + 1, 0
            except _WorkerLostError as error:
                lost += 1
                if lost > RESTARTS:
                    raise RunError(f"{error}, {lost} times in a row; the last checkpoint is whole") from None
                self.say(f"{error}; the data workers are started again from there")
            finally:
                crew.dismiss()


class _WorkerLostError(Exception):
    """What happened to which worker, in a sentence without an end."""


class _Crew:
    """One loader's workers."""

    def __init__(self, run: SteadyLoader, step: int) -> None:
        self.run, self.step, self.stuck = run, step, ""
        self.posts = Posts(run.workers)
        before = set(multiprocessing.active_children())
        loader = make_loader(
            run.source,
            run.pipeline,
            run.batches.starting_at(step),
            workers=run.workers,
            pin_memory=run.pin_memory,
            timeout=min(POLL, run.timeout or POLL),
            posts=self.posts,
            prefetch=run.prefetch,
        )
        self.loaded = iter(loader)
        self.workers = set(multiprocessing.active_children()) - before
        if threading.current_thread() is threading.main_thread():
            # torch's handler raises a worker's death in the middle of whatever runs, such as an optimizer's step.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def next_batch(self) -> Batch:
        """The next batch, or the error of a worker that read it."""
        asked = time.monotonic()
        watchdog = threading.Timer(self.run.timeout + 2 * POLL, self._end_stuck)
        watchdog.daemon = True
        if self.run.timeout:
            watchdog.start()
        try:
            while True:
                try:
                    batch: Batch = next(self.loaded)
                except (RuntimeError, OSError, EOFError) as error:
                    self._look(error, time.monotonic() - asked)
                else:
                    self.step += 1
                    return batch
        finally:
            watchdog.cancel()

    def _end_stuck(self) -> None:
        """End workers of which one stopped while it handed over a batch: torch waits for that without a limit."""
        self.stuck = self._stuck()
        for worker in self.workers:
            worker.kill()

    def _look(self, error: Exception, waited: float) -> None:
        """Raise what is the matter; return if it is only that a batch takes its time."""
        if self.stuck:
            raise _WorkerLostError(self.stuck)
        timed_out = "timed out" in str(error)
        posts = self.posts.read()
        for worker in self.workers:
            if not timed_out:
                worker.join(DYING / len(self.workers))  # its connection is gone a moment before it is
            if not worker.is_alive():
                at = next((post for post in posts if post.pid == worker.pid), None)
                raise _WorkerLostError(
                    f"{self._opening()}: a data worker (process id {worker.pid}) ended with {worker.exitcode}"
                    f"{self._where(at)}; -9 is the kernel's way where memory runs out: fewer [data] workers need less"
                )
        if not timed_out:
            raise error
        if self.run.timeout and waited >= self.run.timeout:
            raise _WorkerLostError(self._stuck())

    def _stuck(self) -> str:
        at = max(
            (post for post in self.posts.read() if post.sample is not None), key=lambda post: post.seconds, default=None
        )
        return (
            f"{self._opening()}: no batch in [data] worker_timeout = {self.run.timeout:g} seconds, a data worker is"
            f" stuck{self._where(at)}{shortage(self.run.batch_bytes)}"
        )

    def _opening(self) -> str:
        return f"step {self.step}, process {self.run.batches.rank}"

    def _where(self, post: Post | None) -> str:
        if post is None or post.sample is None:
            return ""
        return f" at image {post.sample} ({self.run.source.name(post.sample)})"

    def dismiss(self) -> None:
        """End the workers, also those that no longer listen."""
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.join(POLL)  # one that waits for a disk that is gone ends when the disk answers
        del self.loaded
