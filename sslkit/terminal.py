"""Everything that sslkit prints goes through here: no text from outside moves the cursor, adds a line or holds a token.

Text from outside is what files, folders, other libraries and users say: names, keys, labels, messages. Rich's markup is
never read in it.
"""

import json
import logging
import sys
import traceback
import warnings
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sslkit.errors import UserError, escaped, without_tokens


def printed(text: object) -> str:
    """A line as it may be printed: escaped, and without access tokens."""
    return escaped(without_tokens(str(text)))


def say(sentence: object) -> None:
    """Print a sentence on standard error."""
    print(f"sslkit: {printed(sentence)}", file=sys.stderr)


def sentences_of(error: Exception) -> list[str]:
    """What to say of an error, one or more lines as they may be printed."""
    return [printed(each) for each in (error.sentences if isinstance(error, UserError) else (error,))]


def show(line: object, style: str = "", console: Console | None = None) -> None:
    """Print a line on standard output, which the terminal and not we breaks."""
    (console or Console()).print(Text(printed(line), style), soft_wrap=True)


def show_plain(line: object, *, on_error_stream: bool) -> None:
    """Print a line as it is, at once: on standard output, or on standard error where that is for a program."""
    print(printed(line), file=sys.stderr if on_error_stream else sys.stdout, flush=True)


def show_json(value: Any) -> None:
    """Print JSON on standard output; it escapes control characters itself."""
    print(without_tokens(json.dumps(value)))


def show_text(text: str) -> None:
    """Print several lines on standard output."""
    print("\n".join(map(printed, text.split("\n"))))


def show_traceback(error: BaseException) -> None:
    """Print an error of ours in full on standard error."""
    print(_printed_traceback(error), file=sys.stderr)


def guard_other_libraries() -> None:
    """Let warnings and log records of other libraries go the same way, whichever handler prints them.

    They name files and tensors, and repeat what servers say.
    """
    logging.setLogRecordFactory(_PrintedRecord)
    warnings.formatwarning = _format_warning


class _PrintedRecord(logging.LogRecord):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.exc_info and self.exc_info[1]:
            self.exc_text = _printed_traceback(self.exc_info[1])  # which formatters take as it is

    def getMessage(self) -> str:  # noqa: N802 (logging's name)
        return printed(super().getMessage())


def _printed_traceback(error: BaseException) -> str:
    """Several lines; those of a message that look like ours are indented."""
    lines = "".join(traceback.format_exception(error)).rstrip("\n").split("\n")
    return "\n".join(f"  {printed(each)}" if each.startswith("sslkit:") else printed(each) for each in lines)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    del line  # of the source; says nothing to a user
    return f"{printed(filename)}:{lineno}: {category.__name__}: {printed(message)}\n"


class PlainTable(Table):
    """A table whose words are printed as they are."""

    def __init__(self, *headers: str, title: str | None = None) -> None:
        super().__init__(title=title)
        for header in headers:
            self.add_column(header)

    def add_column(self, header: Any = "", *args: Any, **options: Any) -> None:
        """As Rich's, with a header that is no markup."""
        super().add_column(Text(printed(header)), *args, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """As Rich's, with words that are no markup."""
        super().add_row(*(Text(printed(each)) if isinstance(each, str) else each for each in cells), **options)
