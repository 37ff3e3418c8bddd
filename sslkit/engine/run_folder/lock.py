"""The lock of a run folder, which only one run may use at a time. A killed process does not leave it behind."""

import errno
import fcntl
import itertools
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sslkit.errors import UserError
from sslkit.files.atomic import remove_temporary, write_file
from sslkit.files.run_reader import LOCK, lock_holder

PROBE = ".probe.tmp"
MAX_ATTEMPTS = 100  # to open the lock while other processes remove the folder
# Files that a run writes. Temporary files of other commands, which may be running, are left alone.
RUN_FILES = (
    *("probe", "recipe", "recipe.toml", "data.json", "images.parquet", "track.json", "PREEMPTED"),
    *("metrics.jsonl", "results.jsonl", "diagnostics.jsonl", "bad_samples.jsonl", "encoder", "encoder.old"),
)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def refuse_unwritable(folder: Path) -> Iterator[None]:
    """Raise an OSError again as a UserError that names the run folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to: {error.strerror or error}") from error


@contextmanager
def hold_folder(folder: Path, *, active: bool = True) -> Iterator[list[str]]:
    """Create a run folder and lock it, if ``active``; yields messages. New folders that stay empty are removed on exit.

    The kernel holds the lock, on the file ``.lock``. It ends with the process, data workers do not inherit it, and over
    NFS it works between hosts. The file names the process and host that hold it. A UserError is raised if another
    process trains in the folder, or it cannot be written to.
    """
    if not active:
        yield []
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = None
    try:
        descriptor, messages = _take(folder)
        yield messages
    finally:
        with suppress(OSError):
            if descriptor is not None:
                (folder / LOCK).unlink()  # before the lock is released, or it could be another run's file
        with suppress(OSError):
            for path in missing:
                path.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def _take(folder: Path) -> tuple[int, list[str]]:
    with refuse_unwritable(folder):
        descriptor, messages = _open_locked(folder)
        try:
            if previous := lock_holder(descriptor):
                messages.append(f"{folder}: taken over from {previous}, which has ended")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode(), 0)
        except OSError:
            with suppress(OSError):
                (folder / LOCK).unlink()
            os.close(descriptor)
            raise
        return descriptor, messages


def _open_locked(folder: Path) -> tuple[int, list[str]]:
    """Open and lock the lock file. Tries again if the last holder removed the file or the folder meanwhile."""
    file = folder / LOCK
    for attempt in itertools.count(1):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            if attempt == MAX_ATTEMPTS:
                raise
            continue
        messages = _lock(descriptor, folder)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                break
        os.close(descriptor)
    return descriptor, messages


def _lock(descriptor: int, folder: Path) -> list[str]:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = lock_holder(descriptor) or "another process"
        if error.errno in NO_LOCKS:
            return [f"{folder}: this file system has no locks; do not start a second run in this folder"]
        os.close(descriptor)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise UserError(
            f"--output {folder}: {holder} is training there; wait for it, stop it, or choose another folder"
        ) from None
    return []


def prepare_folder(folder: Path) -> None:
    """Remove temporary files of a killed run from a locked folder; raise a UserError if it cannot be written to."""
    checkpoints = folder / "checkpoints"
    with refuse_unwritable(folder):
        checkpoints.mkdir(exist_ok=True)
        for parent in (folder, checkpoints):
            try:
                write_file(parent / PROBE, [bytes(4096)])
            finally:
                remove_temporary(parent, RUN_FILES if parent == folder else ("*",))
