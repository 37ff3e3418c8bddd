"""Start-up: what keeps the time from a command to its work short."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without collecting garbage, of which imports leave none: a quarter of PyTorch's import is looking for it.

    What was imported is left out of later collections too, which makes them short, and its pages stay shared with the
    data workers.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # nanobind complains of what is left at the end
        gc.enable()
