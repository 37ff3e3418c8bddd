"""The size of shared memory, through which workers return batches. Containers often have little of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sslkit.errors import RunError, UserError

SHARED = Path("/dev/shm")
PREFETCH = 4  # batches that a worker loads ahead if there is room
HELD = 2  # batches that the training process holds
MEBIBYTE = 2**20


def free_bytes(folder: Path = SHARED) -> int | None:
    """Free shared memory, divided by the processes on this machine; None if batches are not stored there."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def prefetch_of(batch_bytes: int, workers: int, option: str = "[data] workers", most: int = PREFETCH) -> int | None:
    """Number of batches that each worker may load ahead; None without workers, as DataLoader expects it.

    Args:
        batch_bytes: Size of one process's batch; 0 if workers return other objects than tensors, through pipes.
        workers: Number of workers of one process.
        option: The option or key that sets their number.
        most: Upper bound of the result.

    Raises:
        UserError: Shared memory cannot be written to, or has no room for the batches of so many workers.
    """
    if not workers:
        return None
    if SHARED.is_dir() and not os.access(SHARED, os.W_OK):  # the workers' queues need it too
        raise UserError(
            f"{option}: workers need {SHARED}, which cannot be written to; mount it writable (docker run --shm-size "
            "does so), or set 0 workers, which need none"
        )
    return min(fitting_prefetch(batch_bytes, workers, free_bytes(), option), most) if batch_bytes else most


def fitting_workers(batch_bytes: int, workers: int) -> int:
    """``workers`` if shared memory has room for their batches, else 0."""
    try:
        prefetch_of(batch_bytes, workers)
    except UserError:
        return 0
    return workers


@contextmanager
def explain_death(batch_bytes: int = 0) -> Iterator[None]:
    """Replace DataLoader's error about a dead worker by one sentence.

    Raises:
        RunError: A worker died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        message = " ".join(str(error).split())[:200]
        raise RunError(f"a data worker died: {message}{shortage(batch_bytes)}; fewer --workers need less") from error


def fitting_prefetch(batch_bytes: int, workers: int, free: int | None, option: str = "[data] workers") -> int:
    """Number of batches that each worker may load ahead, at most `PREFETCH`.

    Args:
        batch_bytes: Size of one process's batch.
        workers: Number of workers of one process.
        free: Free shared memory in bytes; None if there is no limit.
        option: The option or key that sets the number of workers.

    Raises:
        UserError: There is no room for one batch per worker.
    """
    if free is None:
        return PREFETCH
    fitting = min((free // batch_bytes - HELD) // workers, PREFETCH)
    if fitting < 1:
        need = (workers + HELD) * batch_bytes
        raise UserError(
            f"{option}: {workers} workers pass batches of {_mebibytes(batch_bytes)} through {SHARED}, which has "
            f"{_mebibytes(free)} free for this process and needs {_mebibytes(need)}; make it larger (docker run "
            "--shm-size), or set fewer workers or a smaller batch, or 0 workers, which need none"
        )
    return fitting


def shortage(batch_bytes: int) -> str:
    """A clause for an error message if shared memory has no room for a batch, else an empty string."""
    free = free_bytes()
    if free is None or free >= batch_bytes:
        return ""
    return f"; {SHARED} has {_mebibytes(free)} free for this process, and a batch takes {_mebibytes(batch_bytes)}"


def _mebibytes(count: int) -> str:
    return f"{count / MEBIBYTE:.1f} MiB"
