"""Python's garbage collection at chosen moments of a run instead of in the middle of a step.

A collection delays the launches on a GPU that come after it. On several processes each would wait for the collections
of all others, which come at different moments.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY = 50  # steps between collections


@contextmanager
def collected_between_steps() -> Iterator[None]:
    """Turn automatic collection off, and leave what exists now, such as imported modules, out of all collections.

    Reference counting works as ever; what is in cycles waits for `collect_garbage`. At the end automatic collection is
    as it was.
    """
    was_on, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    gc.disable()
    if not frozen:  # the command line freezes what it imports
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
        if was_on:
            gc.enable()


def collect_garbage(step: int, *, paused: bool = False) -> None:
    """Collect cyclic garbage: the young every `EVERY` steps, and all where training ``paused`` to evaluate or save.

    ``step`` counts the steps, so that all processes collect after the same ones.
    """
    if paused:
        gc.collect()
    elif step % EVERY == 0:
        gc.collect(1)
