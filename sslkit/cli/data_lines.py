"""What was found where data is read, on the error stream: which images, of which split, column and suffix."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sslkit.errors import without_tokens

LOGGER = logging.getLogger("sslkit.data")


class _ErrorStream(logging.Handler):
    """Prints each line once; under a launcher, in the first process only."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = without_tokens(record.getMessage())
        if line in self.said or os.environ.get("RANK", "0") != "0":
            return
        self.said.add(line)
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


@contextmanager
def data_lines() -> Iterator[None]:
    """Print what `sslkit.data` finds, while a command runs."""
    handler, level, passed_on = _ErrorStream(), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = passed_on
