"""What a command that fails leaves to the launcher that started it: torchrun, or ``accelerate launch``.

PyTorch's launcher ends with a summary of what failed, and shows in it what a process left in the file that
``TORCHELASTIC_ERROR_FILE`` names. Without one it says how to enable tracebacks.
"""

import json
import os
import time
from pathlib import Path

PATIENCE = 10.0  # seconds for which a process waits to see whether the first one of this machine has the same fault
PAUSE = 0.05


def leave_for_launcher(message: str) -> None:
    """Write why this process fails to the launcher's file, if there is one; in the form that PyTorch reads."""
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not name:
        return
    extra = {"timestamp": str(int(time.time()))}
    aside = Path(f"{name}.tmp")
    try:
        aside.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")
        aside.replace(name)
    except OSError:
        return  # the exit code and standard error still say it


def is_said_by_first(message: str) -> bool:
    """Whether the first process of this machine says the same, so that this one need not.

    The launcher keeps the processes' files as ``.../0/error.json``, ``.../1/error.json``, ... A process that alone has
    the fault waits `PATIENCE` seconds, and then has to say it.
    """
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if not name or local_rank == "0" or Path(name).parent.name != local_rank:
        return False
    first = Path(name).parent.parent / "0" / Path(name).name
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if first.is_file():
            return _message_in(first) == message
        time.sleep(PAUSE)
    return False


def _message_in(file: Path) -> str | None:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["message"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
