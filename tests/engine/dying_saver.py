"""Kill a process at every touch of the disk that a save makes, one process a touch, and look at what is left.

    python dying_saver.py FOLDER

Prints the number of touches. Run by test_saving.py as a program of its own, since it forks.
"""

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import small_recipe

from sslkit.engine.checkpoint.format import newest_checkpoint
from sslkit.engine.checkpoint.writer import Saver
from sslkit.engine.run_folder.lock import hold_folder, prepare_folder
from sslkit.engine.setup import build_method

RECIPE = small_recipe("moco_v2", "test_resnet", checkpoint={"every_minutes": 0, "keep": 1})


def save(folder: Path, start: int, step: int) -> None:
    """What a run does that continues from ``start``: hold the folder, save, and leave."""
    torch.manual_seed(step)  # every step has weights of its own
    method = build_method(RECIPE)
    optimizer = torch.optim.SGD([param for param in method.parameters() if param.requires_grad], lr=0.1)
    state: dict[str, Any] = {"scaler": {}, "course": {}, "recipe": RECIPE.as_tables()}
    with hold_folder(folder), Saver(folder, RECIPE, 62, start, log_message=print) as saver:
        prepare_folder(folder)
        saver.save(step, method, optimizer, state)
        if failure := saver.wait():
            raise SystemExit(failure)


def die_at(touch: int, folder: Path) -> None:
    """SIGKILL this process at its touch-th opening, renaming or removing of something in the folder."""
    touches = itertools.count(1)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if not event.startswith(("open", "os.", "shutil.", "ctypes.call_function")):
            return
        inside = any(str(folder) in os.fsdecode(each) for each in arguments if isinstance(each, str | bytes | Path))
        if inside and next(touches) == touch:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def check(folder: Path) -> int:
    """The newest whole checkpoint's step; asserts that there is one, and that `latest` names a whole one."""
    checkpoint, _ = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    torch.manual_seed(checkpoint.step)
    expected = build_method(RECIPE).state_dict()
    assert all(torch.equal(tensor, checkpoint.model[name]) for name, tensor in expected.items())
    latest = (folder / "checkpoints/latest").read_text().strip()
    assert (folder / "checkpoints" / latest / "manifest.json").is_file() or checkpoint.step == 4, latest
    return checkpoint.step


def in_a_child(work: Any) -> int:
    """Fork; the child does the work and ends with 0; returns how it ended."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path) -> None:
    """All touches, in order."""
    torch.set_num_threads(1)
    whole = folder / "whole"
    assert in_a_child(lambda: save(whole, 0, 2)) == 0
    found = []
    for touch in itertools.count(1):
        run = folder / f"killed{touch}"
        shutil.copytree(whole, run)

        def killed(run: Path = run, touch: int = touch) -> None:
            die_at(touch, run)
            save(run, 2, 4)

        ended = in_a_child(killed)
        found.append(check(run))
        if ended == 0:
            break
        assert ended == -signal.SIGKILL, ended
        assert in_a_child(lambda run=run, start=found[-1]: save(run, start, 6)) == 0
        assert check(run) == 6
        left = [each.name for each in (*run.iterdir(), *(run / "checkpoints").iterdir())]
        assert sorted(left) == ["checkpoints", "encoder", "latest", "step-00000006"], left
        shutil.rmtree(run)
    assert found == sorted(found)
    assert set(found) == {2, 4}
    print(f"{len(found) - 1} touches")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
