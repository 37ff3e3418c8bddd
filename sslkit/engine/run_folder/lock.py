"""One run at a time in a folder: a lock that names who holds it, and that a killed process cannot leave behind."""

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
from sslkit.files.atomic import sweep, write_file
from sslkit.files.run_reader import LOCK

PROBE = ".probe.tmp"
ATTEMPTS = 100  # at opening the lock while others remove the folder
# What a run writes in its folder. Other commands write there too, maybe now: what they have aside is theirs.
WRITTEN = (
    *("probe", "recipe", "recipe.toml", "data.json", "images.parquet", "track.json", "PREEMPTED"),
    *("metrics.jsonl", "results.jsonl", "diagnostics.jsonl", "bad_samples.jsonl", "encoder", "encoder.old"),
)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def hold_folder(folder: Path, *, active: bool = True) -> Iterator[list[str]]:
    """Create a run folder and hold its lock. Folders that were made for it and are still empty go on leaving.

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
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    descriptor = None
    try:
        descriptor, said = _take(folder)
        yield said
    finally:
        with suppress(OSError):
            if descriptor is not None:
                (folder / LOCK).unlink()  # before it is released, else it could be another's
        with suppress(OSError):
            for each in missing:
                each.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def _take(folder: Path) -> tuple[int, list[str]]:
    try:
        descriptor, said = _open_locked(folder)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to: {error.strerror}") from error
    try:
        if left := _holder(descriptor):
            said.append(f"{folder}: taken over from {left}, which is gone")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode(), 0)
    except OSError as error:
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(descriptor)
        raise UserError(f"--output {folder}: cannot be written to: {error.strerror}") from error
    return descriptor, said


def _open_locked(folder: Path) -> tuple[int, list[str]]:
    """Lock the file that bears the name. Whoever held it last may have removed the one that was opened, or the folder.

    Raises:
        OSError: It cannot be created.
        UserError: It is locked.
    """
    file = folder / LOCK
    for attempt in itertools.count(1):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            if attempt == ATTEMPTS:
                raise
            continue
        said = _lock(descriptor, folder)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                break
        os.close(descriptor)
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


def prepare_folder(folder: Path) -> None:
    """See that a folder that is held takes a checkpoint, and sweep what a killed run left aside.

    Raises:
        UserError: It cannot be written to.
    """
    try:
        checkpoints = folder / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        for place in (folder, checkpoints):
            try:
                write_file(place / PROBE, [bytes(4096)])
            finally:
                sweep(place, WRITTEN if place == folder else ("*",))
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to: {error.strerror}") from error
