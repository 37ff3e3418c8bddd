"""Faster start of commands."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import modules without garbage collection, which takes a quarter of the time of PyTorch's import.

    Later collections skip the imported objects too, which makes them short and keeps memory shared with data workers.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # else nanobind reports leaks at exit
        gc.enable()
