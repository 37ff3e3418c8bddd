"""Start runs as users do, in processes of their own, and interfere from outside."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import small_recipe
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def write_recipe(folder: Path, name: str = "moco_v2", model: str = "test_resnet", /, **tables: dict[str, Any]) -> Path:
    """A small recipe as a file."""
    file = folder / "recipe.toml"
    file.write_text(small_recipe(name, model, **tables).to_toml())
    return file


def start(
    words: list[str],
    processes: int = 1,
    launcher: list[str] | None = None,
    env: dict[str, str] | None = None,
    before: Callable[[], None] = lambda: None,
) -> subprocess.Popen[str]:
    """Start ``python words`` under torchrun if there are to be two; its output is merged.

    ``before`` is called in the new process before the command takes its place.
    """

    def prepare() -> None:
        # A shell ignores SIGINT in what it starts in the background, tests among it, and children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before()

    more = env or {}
    env = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{env.get('PYTHONPATH', '')}", **more}
    command = [sys.executable, *(TORCHRUN if processes == 2 else []), *(launcher or []), *words]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
        preexec_fn=prepare,
    )


def finish(process: subprocess.Popen[str], timeout: float = 200.0) -> str:
    """What it printed, once it has ended; it is killed if it does not."""
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        process.kill()


def pretrain(recipe: Path, output: Path) -> list[str]:
    """The words of an undisturbed run."""
    return ["-m", "sslkit.pretrain", str(recipe), "--output", str(output)]


def saboteur(what: str, call: int, rank: int, recipe: Path, output: Path) -> list[str]:
    """The words of a run that is broken; see saboteur.py."""
    return [str(HERE / "saboteur.py"), what, str(call), str(rank), str(recipe), str(output)]


def wait_for_lines(file: Path, count: int, process: subprocess.Popen[str], seconds: float = 150.0) -> None:
    """Until a file has so many lines."""
    deadline = time.monotonic() + seconds
    while not (file.is_file() and file.read_text().count("\n") >= count):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")
