"""Files and folders that are whole or not there, also when the process is killed or the power goes.

What is written lies aside, under a hidden name that ends in ``.tmp``, until it is on the disk; then it is renamed, and
the folder that holds the name is synced. What a killed process left aside is swept at the next start.
"""

import ctypes
import errno
import glob
import hashlib
import json
import os
import platform
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslkit.errors import UserError

CHUNK = 16 * 2**20  # bytes
ABANDONED = 86400.0  # seconds after which what lies aside is of a process that was killed
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux
# What safetensors calls them; its header names no others that a module or an optimizer has.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Give an empty folder to fill; on leaving, it takes the place of ``final``. After an error nothing has changed.

    Files in it must be written by this module's functions, which sync them.
    """
    aside = _aside(final)
    remove(aside)
    aside.mkdir()
    try:
        yield aside
        sync(aside)
        _swap(aside, final)
        sync(final.parent)
    finally:
        remove(aside)


def write_file(file: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file, sync it, and read it back to see that the disk holds what was meant.

    Nothing here holds the GIL for long, so that another thread may train meanwhile.

    Returns:
        The manifest's entry, ``{"bytes": size, "sha256": of what was handed over}``.

    Raises:
        OSError: It could not be written (disk full, quota, ...) or reads back differently; names the file.
    """
    digest, size = hashlib.sha256(), 0
    try:
        if file.is_symlink() or not file.is_dir():
            file.unlink(missing_ok=True)  # a stranger's pipe of that name would be waited for, a link followed
        with file.open("xb") as stream:
            for chunk in chunks:
                digest.update(chunk)
                size += stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
            if sys.platform == "linux":  # out of the page cache, else reading would show the cache and not the disk
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").digest() != digest.digest():
                raise OSError(errno.EIO, "the disk returns other bytes than were written")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_json(file: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Write plain data as JSON; see `write_file`."""
    return write_file(file, [(json.dumps(value, indent=1) + "\n").encode()])


def write_text(file: Path, text: str) -> dict[str, Any]:
    """Write a text; see `write_file`."""
    return write_file(file, [text.encode("utf-8", errors="replace")])


def write_tensors(file: Path, tensors: dict[str, Tensor], **metadata: str) -> dict[str, Any]:
    """Write contiguous tensors in host memory as safetensors, straight from where they lie; see `write_file`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    # The format wants the data in order of alignment.
    ordered = dict(sorted(tensors.items(), key=lambda named: (-named[1].element_size(), named[0])))
    for name, tensor in ordered.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write_file(file, [len(text).to_bytes(8, "little"), text, *_chunks(ordered.values())])


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def replace_text(file: Path, text: str) -> None:
    """Write a small text file in the place of an older one, whole at every instant."""
    replace_file(file, [text.encode()])


def replace_file(file: Path, chunks: Iterable[bytes | memoryview], *, shared: bool = False) -> None:
    """Write a file in the place of an older one, whole at every instant.

    Args:
        file: What to write.
        chunks: Its content.
        shared: Whether other processes may write the same file at the time; the last one's stays.

    Raises:
        OSError: It could not be written; the older one is as it was.
    """
    aside = _own_aside(file) if shared else _aside(file)
    try:
        write_file(aside, chunks)
        os.replace(aside, file)
    except OSError:
        remove(aside)
        raise
    sync(file.parent)


def write_output(file: Path, text: str) -> None:
    """Write a text file that a user named, whole at every instant; a pipe or a device of that name is written into.

    A link stays, and what it leads to is replaced. It is not synced: whoever named the file can have it made again.

    Raises:
        OSError: It could not be written; an older one is as it was.
    """
    content, target = text.encode("utf-8", errors="replace"), Path(os.path.realpath(file))
    if file.exists() and not file.is_file():
        file.write_bytes(content)
        return
    aside = _own_aside(target)
    try:
        aside.write_bytes(content)
        os.replace(aside, target)
    except PermissionError:  # a file in a folder to which nothing may be added
        if not file.is_file():
            raise
        file.write_bytes(content)
    except OSError:
        remove(aside)
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; a folder goes out of sight first, so that no one finds half of it."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        hidden = path if path.name.endswith(".tmp") else _aside(path)
        if hidden != path:
            remove(hidden)
            os.rename(path, hidden)
        shutil.rmtree(hidden)


def refuse_links(run: Path) -> None:
    """See that nothing in a run folder is a link, which could have us write anywhere, or a pipe, which never ends.

    Raises:
        UserError: Something is; names it.
    """
    for folder in (run, run / "pictures", run / "checkpoints", run / "encoder"):
        for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
            if entry.is_symlink():
                if folder.name in (
                    "checkpoints",
                    "encoder",
                ):  # what is written there takes a link's place, and what is read is checked
                    continue
                raise UserError(
                    f"{entry}: is a link; a run's files must lie in its folder (a link to the whole is fine)"
                )
            if not (entry.is_file() or entry.is_dir()) and os.path.lexists(entry):  # it may just have been removed
                raise UserError(f"{entry}: is a pipe, a socket or a device; a run has files and folders only")


def sweep(folder: Path, names: Iterable[str] = ("*",)) -> None:
    """Remove what a killed process left aside in ``folder``, of all files or of those named."""
    for name in names:
        for left in folder.glob(f".{name}.tmp"):
            remove(left)


def sync(path: Path) -> None:
    """Put a file's content, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _own_aside(path: Path) -> Path:
    """As `_aside`, but of this process alone. What killed processes left aside for the same file is removed."""
    here = f"{zlib.crc32(platform.node().encode()):08x}"
    for left in path.parent.glob(f".{glob.escape(path.name)}.*-*.tmp"):
        host, _, process = left.name.removesuffix(".tmp").rpartition(".")[2].partition("-")
        with suppress(OSError):  # another process has removed it
            if (host == here and _is_gone(process)) or time.time() - left.stat().st_mtime > ABANDONED:
                remove(left)
    return path.with_name(f".{path.name}.{here}-{os.getpid()}.tmp")


def _is_gone(process: str) -> bool:
    """Whether no process of this machine has this number."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError, ValueError):
        pass
    return False


def _chunks(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    for tensor in tensors:
        if tensor.nbytes:
            whole = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
            yield from (whole[start : start + CHUNK] for start in range(0, tensor.nbytes, CHUNK))


def _swap(aside: Path, final: Path) -> None:
    """Rename ``aside`` to ``final``; what stood there is then aside."""
    if not final.exists():
        os.rename(aside, final)
    elif not _exchange(aside, final):
        # Where the file system cannot exchange two names (NFS, macOS), there is an instant with neither.
        old = _aside(final.with_name(f"{final.name}.old"))
        remove(old)
        os.rename(final, old)
        os.rename(aside, final)
        remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one operation, if the system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and not rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
