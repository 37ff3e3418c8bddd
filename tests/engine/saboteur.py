"""``sslkit pretrain`` with one thing broken on purpose, from outside the shipped code.

    python saboteur.py WHAT CALL RANK RECIPE OUTPUT [option ...]

At the CALL-th objective of process RANK: ``nan`` makes its loss not a number, ``raise`` raises, ``memory`` runs out of
memory, ``sleep`` hangs in Python, ``freeze`` and ``kill`` send this process the signal, ``mismatch`` calls a collective
that nobody else does; ``drift`` moves one weight after the update.
"""

import os
import signal
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from sslkit.cli import main
from sslkit.engine import setup as run
from sslkit.methods.base import Step


def sabotage(what: str, call: int, rank: int) -> None:
    """Make `build_method` give a method that breaks."""
    build = run.build_method

    def build_broken(*arguments: Any) -> Any:
        method = build(*arguments)
        objective, after_update = method.objective, method.after_update
        calls = 0

        def broken_objective(*args: Any) -> Step:
            nonlocal calls
            calls += 1
            step: Step = objective(*args)
            here = int(os.environ.get("RANK", "0")) == rank
            if here and calls == call:
                break_step(what, step)
            return step

        def broken_update(progress: Any) -> dict[str, float]:
            moved: dict[str, float] = after_update(progress)
            if what == "drift" and calls == call and int(os.environ.get("RANK", "0")) == rank:
                with torch.no_grad():
                    next(method.projector.parameters()).view(-1)[0] += 1e-3
            return moved

        method.objective, method.after_update = broken_objective, broken_update
        return method

    run.build_method = build_broken


def break_step(what: str, step: Step) -> None:
    """Do the damage."""
    if what == "nan":
        step.loss = step.loss * float("nan")
    elif what == "raise":
        raise ValueError("out of luck")
    elif what == "memory":
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes")
    elif what == "sleep":
        time.sleep(1000)
    elif what == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "mismatch":
        dist.all_reduce(torch.zeros(5000))


if __name__ == "__main__":
    what, call, rank, *words = sys.argv[1:]
    sabotage(what, int(call), int(rank))
    recipe, output, *options = words
    main(["pretrain", recipe, "--output", output, *options])
