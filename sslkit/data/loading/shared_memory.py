"""Batches travel from data workers through shared memory, which containers often have little of."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sslkit.errors import RunError, UserError

SHARED = Path("/dev/shm")
PREFETCH = 4  # batches that a worker makes ahead, where there is room
HELD = 2  # batches that the process which trains holds on to
MEBIBYTE = 2**20


def free_bytes(folder: Path = SHARED) -> int | None:
    """This process's share of what is free of it; None where batches do not lie there.

    The processes that a launcher started on this machine share it, and look before any of them has begun to load.
    """
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def prefetch_of(batch_bytes: int, workers: int, option: str = "[data] workers", most: int = PREFETCH) -> int | None:
    """How many batches each worker may make ahead; None without workers, as a DataLoader takes it.

    Args:
        batch_bytes: Of one process's batch of tensors; 0 where workers hand over other things, through pipes.
        workers: Of one process.
        option: What sets their number.
        most: More are never made ahead.

    Raises:
        UserError: Shared memory cannot be written to, or has no room for batches of so many workers.
    """
    if not workers:
        return None
    check_writable(option)
    return min(fitting_prefetch(batch_bytes, workers, free_bytes(), option), most) if batch_bytes else most


def fitting_workers(batch_bytes: int, workers: int) -> int:
    """So many workers where shared memory has room for their batches, else none, which need none."""
    try:
        prefetch_of(batch_bytes, workers)
    except UserError:
        return 0
    return workers


def check_writable(option: str, folder: Path = SHARED) -> None:
    """See that workers can be started at all: their queues lie in shared memory too.

    Raises:
        UserError: It cannot be written to.
    """
    if folder.is_dir() and not os.access(folder, os.W_OK):
        raise UserError(
            f"{option}: workers need {folder}, which cannot be written to; mount it writable (docker run --shm-size "
            "does), or take 0, which needs none"
        )


@contextmanager
def explain_death(batch_bytes: int = 0) -> Iterator[None]:
    """Turn what a DataLoader says of a worker that died into one sentence.

    Raises:
        RunError: A worker died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        said = " ".join(str(error).split())[:200]
        raise RunError(f"a data worker died: {said}{shortage(batch_bytes)}; fewer --workers need less") from error


def fitting_prefetch(batch_bytes: int, workers: int, free: int | None, option: str = "[data] workers") -> int:
    """How many batches each worker may make ahead, at most `PREFETCH`.

    Args:
        batch_bytes: Of one process's batch: all views, uint8.
        workers: Of one process.
        free: Bytes of shared memory; None where there is no such bound.
        option: What sets the number of workers.

    Raises:
        UserError: Not even one.
    """
    if free is None:
        return PREFETCH
    fitting = min((free // batch_bytes - HELD) // workers, PREFETCH)
    if fitting < 1:
        need = (workers + HELD) * batch_bytes
        raise UserError(
            f"{option}: {workers} workers pass batches of {_mebibytes(batch_bytes)} through {SHARED}, which has "
            f"{_mebibytes(free)} free for this process and needs {_mebibytes(need)}; give it more (docker run "
            "--shm-size), or take fewer workers or a smaller batch, or 0 workers, which need none"
        )
    return fitting


def shortage(batch_bytes: int) -> str:
    """A clause for an error, if shared memory has no room for a batch; else empty."""
    free = free_bytes()
    if free is None or free >= batch_bytes:
        return ""
    return f"; {SHARED} has {_mebibytes(free)} free for this process, and a batch takes {_mebibytes(batch_bytes)}"


def _mebibytes(count: int) -> str:
    return f"{count / MEBIBYTE:.1f} MiB"
