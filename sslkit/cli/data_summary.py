"""What was found where data is read: which images, of which split, column and suffix."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sslkit.terminal import show_plain

LOGGER = logging.getLogger("sslkit.data")


class _Lines(logging.Handler):
    """Prints each line once; under a launcher, in the first process only."""

    def __init__(self, *, on_error_stream: bool) -> None:
        super().__init__(logging.INFO)
        self.on_error_stream, self.said = on_error_stream, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line in self.said or os.environ.get("RANK", "0") != "0":
            return
        self.said.add(line)
        with suppress(OSError):
            show_plain(line, on_error_stream=self.on_error_stream)


@contextmanager
def data_lines(*, on_error_stream: bool) -> Iterator[None]:
    """Print what `sslkit.data` finds, while a command runs.

    Args:
        on_error_stream: Where standard output is for a program.
    """
    handler, level, passed_on = _Lines(on_error_stream=on_error_stream), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = passed_on
