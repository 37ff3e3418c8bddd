"""What a command that fails leaves to the launcher that started it: torchrun, or ``accelerate launch``.

PyTorch's launcher ends with a summary of what failed, and shows in it what a process left in the file that
``TORCHELASTIC_ERROR_FILE`` names. Without one it says how to enable tracebacks. It keeps the files of a machine's
processes as ``.../0/error.json``, ``.../1/error.json``, ..., and ends all processes when one has failed.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 10.0  # seconds for which a process that fails waits to see whether the others of this machine fail too
PAUSE = 0.05


def leave_for_launcher(message: str) -> None:
    """Write why this process fails to the launcher's file, if there is one; in the form that PyTorch reads.

    From here on SIGTERM is ignored: the launcher sends it when another process has failed, and this one is about to end
    with its own exit code.
    """
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not name:
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    extra = {"timestamp": str(int(time.time()))}
    aside = Path(f"{name}.tmp")
    try:
        aside.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")
        aside.replace(name)
    except OSError:
        return  # the exit code and standard error still say it


def is_said_by_first(message: str) -> bool:
    """Whether the first process of this machine says the same, so that this one need not; waits for it."""
    files = _files_of_all()
    if not files or os.environ["LOCAL_RANK"] == "0":
        return False
    return _wait_until(files[0].is_file) and _message_in(files[0]) == message


def wait_for_others() -> None:
    """Let the other processes of this machine come to the same end, so that the launcher need not kill them."""
    files = _files_of_all()
    _wait_until(lambda: all(file.is_file() for file in files))


def _files_of_all() -> list[Path]:
    """The launcher's files of this machine's processes, if it is one that keeps them so and there are several."""
    name, local_rank = os.environ.get("TORCHELASTIC_ERROR_FILE", ""), os.environ.get("LOCAL_RANK", "")
    size = os.environ.get("LOCAL_WORLD_SIZE", "")
    file = Path(name)
    if not name or not size.isdecimal() or int(size) < 2 or file.parent.name != local_rank:
        return []
    return [file.parent.parent / str(rank) / file.name for rank in range(int(size))]


def _wait_until(is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(PAUSE)
    return True


def _message_in(file: Path) -> str | None:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["message"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
