"""End this process, and report errors to the launcher that started it: torchrun or ``accelerate launch``.

PyTorch's launcher kills all processes when one has failed, and prints a summary with the message that a process wrote
to the file in ``TORCHELASTIC_ERROR_FILE``. On a machine these are ``.../0/error.json``, ``.../1/error.json``, ...
"""

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

TIMEOUT = 10.0  # seconds that a failed process waits for the other processes of this machine to fail too
PAUSE = 0.05


def leave_for_launcher(message: str) -> None:
    """Write the error message of this process to the launcher's file, if there is one, in PyTorch's format.

    SIGTERM is ignored from now on: the launcher sends it when another process has failed, but this process is about to
    exit with its own code.
    """
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not name:
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    extra = {"timestamp": str(int(time.time()))}
    temporary = Path(f"{name}.tmp")
    try:
        temporary.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")
        temporary.replace(name)
    except OSError:
        return  # standard error and the exit code still report it


def is_printed_by_first(message: str) -> bool:
    """Whether the first process of this machine prints the same message. Waits for that process to fail."""
    files = _files_of_all()
    if not files or os.environ["LOCAL_RANK"] == "0":
        return False
    return _wait_until(files[0].is_file) and _message_in(files[0]) == message


def wait_for_others() -> None:
    """Wait until the other processes of this machine have failed too, so that the launcher does not kill them."""
    files = _files_of_all()
    _wait_until(lambda: all(file.is_file() for file in files))


def exit_without_finalization(code: str | int | None) -> None:
    """Exit after the exit handlers, without the interpreter's finalization; does nothing where torch is not loaded.

    During finalization, CPython before 3.14 ends a thread that asks for the interpreter's lock. If it is a thread of a
    C++ library, such as a process group's, this aborts the process: a finished run would have the exit code 134.
    """
    watched = sys.getprofile() or sys.gettrace()  # a profiler, which writes its file afterwards
    if "torch" not in sys.modules or isinstance(code, str) or watched:
        return
    threading._shutdown()  # type: ignore[attr-defined]  # joins the threads that are not daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or its reader has ended
            stream.flush()
    os._exit(code or 0)


def _files_of_all() -> list[Path]:
    """The error files of all processes of this machine; none if there is one process or another launcher."""
    name, local_rank = os.environ.get("TORCHELASTIC_ERROR_FILE", ""), os.environ.get("LOCAL_RANK", "")
    size = os.environ.get("LOCAL_WORLD_SIZE", "")
    file = Path(name)
    if not name or not size.isdecimal() or int(size) < 2 or file.parent.name != local_rank:
        return []
    return [file.parent.parent / str(rank) / file.name for rank in range(int(size))]


def _wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(PAUSE)
    return True


def _message_in(file: Path) -> str | None:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["message"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
