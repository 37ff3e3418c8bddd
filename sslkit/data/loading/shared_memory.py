"""The size of shared memory, through which workers return batches. Containers often have little of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sslkit.errors import RunError, UserError, first_line

SHARED = Path("/dev/shm")
PREFETCH = 4  # batches that a worker loads ahead if there is room
HELD = 2  # batches that the training process holds


def free_bytes(folder: Path = SHARED) -> int | None:
    """Free bytes of shared memory for each process on this machine; None if there is no shared memory."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def prefetch_of(batch_bytes: int, workers: int, option: str = "[data] workers", most: int = PREFETCH) -> int | None:
    """Number of batches that each worker may load ahead; None without workers, as DataLoader expects it.

    Args:
        batch_bytes: Size of one process's batch; 0 if workers return other objects than tensors, through pipes.
        workers: Number of workers of one process, which ``option`` sets.
        option: For the `UserError` if shared memory cannot be written to, or has no room for the batches.
        most: Upper bound of the result.
    """
    if not workers:
        return None
    if SHARED.is_dir() and not os.access(SHARED, os.W_OK):  # the workers' queues need it too
        raise UserError(
            f"{option}: workers need {SHARED}, which cannot be written to; mount it writable (docker run --shm-size "
            "does so), or set 0 workers, which need none"
        )
    if not batch_bytes or (free := free_bytes()) is None:
        return most
    fitting = (free // batch_bytes - HELD) // workers
    if fitting < 1:
        need = (workers + HELD) * batch_bytes
        raise UserError(
            f"{option}: {workers} workers pass batches of {_mebibytes(batch_bytes)} through {SHARED}, which has "
            f"{_mebibytes(free)} free for this process and needs {_mebibytes(need)}; make it larger (docker run "
            "--shm-size), or set fewer workers or a smaller batch, or 0 workers, which need none"
        )
    return min(fitting, most)


def fitting_workers(batch_bytes: int, workers: int) -> int:
    """``workers`` if shared memory has room for their batches, else 0."""
    try:
        prefetch_of(batch_bytes, workers)
    except UserError:
        return 0
    return workers


@contextmanager
def explain_death(batch_bytes: int = 0) -> Iterator[None]:
    """Raise DataLoader's error about a dead worker as a `RunError` of one sentence."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = first_line(error) + shortage(batch_bytes)
        raise RunError(f"a data worker died: {reason}; fewer --workers need less") from error


def shortage(batch_bytes: int) -> str:
    """A clause for an error message if shared memory has no room for a batch, else an empty string."""
    free = free_bytes()
    if free is None or free >= batch_bytes:
        return ""
    return f"; {SHARED} has {_mebibytes(free)} free for this process, and a batch takes {_mebibytes(batch_bytes)}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
