"""Batches travel from data workers through shared memory, which containers often have little of."""

import os
from pathlib import Path

from sslkit.errors import UserError

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


def fitting_prefetch(batch_bytes: int, workers: int, free: int | None) -> int:
    """How many batches each worker may make ahead, at most `PREFETCH`.

    Args:
        batch_bytes: Of one process's batch: all views, uint8.
        workers: Of one process.
        free: Bytes of shared memory; None where there is no such bound.

    Raises:
        UserError: Not even one.
    """
    if free is None:
        return PREFETCH
    fitting = min((free // batch_bytes - HELD) // workers, PREFETCH)
    if fitting < 1:
        need = (workers + HELD) * batch_bytes
        raise UserError(
            f"[data] workers: {workers} workers pass batches of {_mebibytes(batch_bytes)} through {SHARED}, which has "
            f"{_mebibytes(free)} free for this process and needs {_mebibytes(need)}; give it more (docker run "
            "--shm-size), or take fewer workers or a smaller batch, or workers = 0, which needs none"
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
