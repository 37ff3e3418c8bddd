"""Write files and folders atomically: after a kill or a power failure they are complete or absent.

Data is written under a hidden name that ends in ``.tmp`` and synced to the disk. Then it is renamed, and its parent
folder is synced. Temporary files of killed processes are removed at the next start.
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
STALE_SECONDS = 86400.0  # temporary files older than this belong to killed processes
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # constants of Linux
# Names of dtypes in the header of safetensors files.
DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it replaces ``final`` on exit. If an exception is raised, ``final`` is unchanged.

    Files in it must be written by the functions of this module, which sync them.
    """
    temporary = _temporary(final)
    remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
        sync(temporary)
        _move(temporary, final)
        sync(final.parent)
    finally:
        remove(temporary)


def write_file(file: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file, sync it, and read it back to verify its content: ``{"bytes": size, "sha256": digest}``.

    The GIL is never held for long, so that another thread can train meanwhile. The page cache is dropped before the
    check, on Linux only. Raises `OSError`, which names the file, if it could not be written or reads back differently.
    """
    digest, size = hashlib.sha256(), 0
    try:
        if file.is_symlink() or not file.is_dir():
            file.unlink(missing_ok=True)  # opening a pipe would block, a link would be followed
        with file.open("xb") as stream:
            for chunk in chunks:
                digest.update(chunk)
                size += stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
            if sys.platform == "linux":  # drop the page cache, so that the check reads the disk
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if sha256_of(file) != digest.hexdigest():
            raise OSError(errno.EIO, "the disk returns other bytes than were written")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_json(file: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Write plain data as JSON; see `write_file`."""
    return write_file(file, [(json.dumps(value, indent=1) + "\n").encode()])


def write_text(file: Path, text: str) -> dict[str, Any]:
    """Write text as UTF-8; see `write_file`."""
    return write_file(file, [text.encode("utf-8", errors="replace")])


def write_tensors(file: Path, tensors: dict[str, Tensor], **metadata: str) -> dict[str, Any]:
    """Write contiguous CPU tensors as safetensors without copying them; see `write_file`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    # The format requires the data to be ordered by alignment.
    ordered = dict(sorted(tensors.items(), key=lambda named: (-named[1].element_size(), named[0])))
    for name, tensor in ordered.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write_file(file, [len(text).to_bytes(8, "little"), text, *_chunks(ordered.values())])


def sha256_of(file: Path) -> str:
    """SHA-256 of the content of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def replace_text(file: Path, text: str) -> None:
    """Replace a text file atomically; see `replace_file`."""
    replace_file(file, [text.encode()])


def replace_file(file: Path, chunks: Iterable[bytes | memoryview], *, shared: bool = False) -> None:
    """Replace a file atomically, or create it. If ``shared``, other processes may do the same; the last one wins.

    Raises `OSError` if the file could not be written; an existing one is unchanged.
    """
    temporary = _process_temporary(file) if shared else _temporary(file)
    try:
        write_file(temporary, chunks)
        os.replace(temporary, file)
    except OSError:
        remove(temporary)
        raise
    sync(file.parent)


def write_output(file: Path, text: str) -> None:
    """Write a text file that the user named, atomically. Pipes and devices are written to.

    A link is kept and its target replaced. The file is not synced, since it can be generated again. Raises `OSError` if
    the file could not be written; an existing one is unchanged.
    """
    content, target = text.encode("utf-8", errors="replace"), Path(os.path.realpath(file))
    if file.exists() and not file.is_file():
        file.write_bytes(content)
        return
    temporary = _process_temporary(target)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, target)
    except OSError as error:
        remove(temporary)
        if not (isinstance(error, PermissionError) and file.is_file()):
            raise
        file.write_bytes(content)  # an existing file in a folder that is not writable


def remove(path: Path) -> None:
    """Remove a file or folder if it exists. A folder is renamed first, so that no one sees it half removed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        hidden = path if path.name.endswith(".tmp") else _temporary(path)
        if hidden != path:
            remove(hidden)
            os.rename(path, hidden)
        shutil.rmtree(hidden)


def refuse_links(run: Path) -> None:
    """Raise `UserError` if a run folder has links, which would redirect writes, or pipes, which would block reads."""
    for folder in (run, run / "pictures", run / "checkpoints", run / "encoder"):
        for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
            # In "checkpoints" and "encoder", writing replaces a link, and reading checks the content.
            if entry.is_symlink() and folder.name not in ("checkpoints", "encoder"):
                raise UserError(f"{entry}: is a link; files of a run must lie in its folder (the folder may be a link)")
            is_special = not (entry.is_symlink() or entry.is_file() or entry.is_dir())
            if is_special and os.path.lexists(entry):  # it may just have been removed
                raise UserError(f"{entry}: is a pipe, socket or device; a run folder holds only files and folders")


def remove_temporary(folder: Path, names: Iterable[str]) -> None:
    """Remove the temporary files that killed processes left in ``folder`` for files of these names or patterns."""
    for name in names:
        for path in folder.glob(f".{name}.tmp"):
            remove(path)


def sync(path: Path) -> None:
    """Flush the content of a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _process_temporary(path: Path) -> Path:
    """A temporary path of this process only. Those of killed processes for the same path are removed."""
    host = f"{zlib.crc32(platform.node().encode()):08x}"
    for other in path.parent.glob(f".{glob.escape(path.name)}.*-*.tmp"):
        its_host, _, pid = other.name.removesuffix(".tmp").rpartition(".")[2].partition("-")
        with suppress(OSError):  # another process has removed it
            if (its_host == host and _has_ended(pid)) or time.time() - other.stat().st_mtime > STALE_SECONDS:
                remove(other)
    return path.with_name(f".{path.name}.{host}-{os.getpid()}.tmp")


def _has_ended(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (OSError, OverflowError, ValueError) as error:
        return isinstance(error, ProcessLookupError)
    return False


def _chunks(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    for tensor in tensors:
        if tensor.nbytes:
            data = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
            yield from (data[start : start + CHUNK] for start in range(0, tensor.nbytes, CHUNK))


def _move(temporary: Path, final: Path) -> None:
    """Rename ``temporary`` to ``final``; an existing ``final`` becomes ``temporary`` or is removed."""
    if not final.exists():
        os.rename(temporary, final)
    elif not _exchange(temporary, final):
        # Where the file system cannot exchange two names (NFS, macOS), neither exists for an instant.
        old = _temporary(final.with_name(f"{final.name}.old"))
        remove(old)
        os.rename(final, old)
        os.rename(temporary, final)
        remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one operation; False if the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and not rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
