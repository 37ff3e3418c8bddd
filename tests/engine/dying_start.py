"""End a run's first start at every write that it makes, and start it again in the same folder.

    python dying_start.py kill|full FOLDER

``kill`` ends the process at the write; ``full`` lets the write, and every later one, fail as on a full disk. Run by
test_starting.py as a program of its own, since it forks. Prints one line for each write.
"""

import errno
import itertools
import os
import resource
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from conftest import small_recipe
from PIL import Image

import sslkit
from sslkit.errors import RunError, UserError
from sslkit.recipe.resolve import Recipe

KILLED, REFUSED, FAULT = 9, 2, 1
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.truncate", "os.rmdir", "ctypes.call_function")


def small_run(images: Path) -> Recipe:
    """One step on eight images."""
    return small_recipe(
        "simclr",
        "test_resnet",
        data={"path": str(images), "split": "train", "workers": 0},
        views={"policy": "small_gray", "size": 16},
        train={"max_steps": 1, "batch_size": 4, "log_every": 1},
        monitor={"diagnose_every": 1},
    )


def make_images(folder: Path) -> Path:
    """Eight images of noise."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(draws.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / f"{index}.png")
    return folder


def fail_at(number: int, run: Path, fail: Callable[[str], None]) -> None:
    """Call ``fail`` at the write with this number, and at each later one; all of those below ``run`` count."""
    writes = itertools.count(1)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            mode, flags = arguments[1], arguments[2]
            written = (isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))) or mode == "a+b"
        else:
            written = event in WRITES
        if not written:
            return
        places = [os.fsdecode(each) for each in arguments if isinstance(each, str | bytes | Path)]
        if any(place == str(run) or place.startswith(f"{run}/") for place in places) and next(writes) >= number:
            fail(f"{event} {places[0]}")

    sys.addaudithook(hook)


def kill(_what: str) -> None:
    """End this process at once."""
    os._exit(KILLED)


def no_room(what: str) -> None:
    """What the system says when a disk is full; removing still works."""
    if not what.startswith(("os.remove", "os.rmdir")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what)


FAILURES = {"kill": kill, "full": no_room}


def in_a_child(work: Callable[[], object], log: Path) -> int:
    """How a forked child that does the work ends: 0, `KILLED`, `REFUSED` by a sentence, or `FAULT`."""
    child = os.fork()
    if not child:
        code = 0
        try:
            with log.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            work()
        except (UserError, RunError) as error:
            code = REFUSED
            print(error)
        except BaseException:
            code = FAULT
            traceback.print_exc()
        finally:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempt(disturb: Callable[[], None], run: Path, recipe: Recipe) -> tuple[int, list[str]]:
    """A first start that is disturbed, then one that is not; returns how the first ended and what it left."""
    log = run.with_suffix(".log")

    def disturbed() -> None:
        disturb()
        sslkit.train(recipe, run)

    ended = in_a_child(disturbed, log)
    assert ended != FAULT, f"{run.name}:\n{log.read_text()}"
    left = sorted(str(each.relative_to(run)) for each in run.rglob("*")) if run.exists() else []
    again = in_a_child(lambda: sslkit.train(recipe, run), log)
    assert again == 0, f"{run.name}, which left {left}:\n{log.read_text()}"
    assert (run / "checkpoints/step-00000001/manifest.json").is_file(), run.name
    assert (run / "encoder/model.safetensors").is_file(), run.name
    assert not list(run.rglob(".*")), run.name
    return ended, left


def main(how: str, folder: Path) -> None:
    """Every write in order until training has begun; saving is the matter of dying_saver.py."""
    torch.set_num_threads(1)
    recipe = small_run(make_images(folder / "images"))
    sslkit.train(recipe, folder / "whole")  # so that children find everything imported
    for number in itertools.count(1):
        run = folder / f"{how}{number}"
        ended, left = attempt(lambda run=run, number=number: fail_at(number, run, FAILURES[how]), run, recipe)
        print(f"write {number}: ended with {ended}, left {left}")
        assert ended in (KILLED, REFUSED), number
        if "metrics.jsonl" in left:
            break
    for most in (0, 50, 4096, 20_000) if how == "full" else ():  # bytes of a file: a write that is cut off
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        limits = (most, hard)
        run = folder / f"limit{most}"
        ended, left = attempt(lambda limits=limits: resource.setrlimit(resource.RLIMIT_FSIZE, limits), run, recipe)
        print(f"files of {most} bytes: ended with {ended}, left {left}")
        assert ended == REFUSED, most


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
