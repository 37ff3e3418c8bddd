"""One run at a time in a folder: a lock that names who holds it, and that a killed process cannot leave behind."""

import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sslkit.durable import sweep, write_file
from sslkit.errors import UserError

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def hold_folder(folder: Path, *, active: bool = True) -> Iterator[list[str]]:
    """Create a run folder, hold its lock, see that it can be written to, and sweep what a killed run left aside.

    The lock is the kernel's, on ``.lock``: it goes with the process, however that ends, and is not inherited by data
    workers. Process and host stand in the file for whoever finds it taken. Over NFS it holds between hosts.

    Args:
        folder: Run folder.
        active: False on all processes but the first, for which this does nothing.

    Yields:
        A sentence if the folder was taken over from a process that is gone.

    Raises:
        UserError: Another process trains there, or it cannot be written to.
    """
    if not active:
        yield []
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, said = _take(folder)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to: {error.strerror}") from error
    try:
        _prepare(folder)
        yield said
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # before it is released, else it could be another's
        os.close(descriptor)


def _take(folder: Path) -> tuple[int, list[str]]:
    """Lock the file that bears the name; whoever held it last may have removed the one that was opened."""
    file = folder / LOCK
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        said = _lock(descriptor, folder)
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            break
        os.close(descriptor)
    if left := _holder(descriptor):
        said.append(f"{folder}: taken over from {left}, which is gone")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode(), 0)
    return descriptor, said


def _lock(descriptor: int, folder: Path) -> list[str]:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(descriptor) or "another process"
        if error.errno in NO_LOCKS:
            return [f"{folder}: this file system has no locks; see to it that no second run uses the folder"]
        os.close(descriptor)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise UserError(
            f"--output {folder}: {holder} is training there; wait for it, stop it, or choose another folder"
        ) from None
    return []


def _holder(descriptor: int) -> str:
    """Who wrote the lock file, in words; empty if nobody did."""
    try:
        entry = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(entry['pid'])} on {entry['host']}"
    except (ValueError, KeyError, TypeError):
        return ""


def _prepare(folder: Path) -> None:
    """Write as a checkpoint will be written, before anything is trained for nothing."""
    try:
        checkpoints = folder / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        for place in (folder, checkpoints):
            write_file(place / ".probe.tmp", [bytes(4096)])
            sweep(place)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to: {error.strerror}") from error
