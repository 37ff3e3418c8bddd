"""All output of sslkit goes through this module, which escapes unprintable characters and removes access tokens.

File names, labels and messages of other libraries may contain anything. They must not move the cursor, start a new
line, be read as Rich's markup, or reveal a token.
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

from sslkit.errors import UserError, without_tokens
from sslkit.text import escape


def sanitize(text: object) -> str:
    """A line that is safe to print: escaped, and without access tokens."""
    return escape(without_tokens(str(text)))


def print_message(message: object) -> None:
    """Print a message on standard error."""
    print(f"sslkit: {sanitize(message)}", file=sys.stderr)


def error_messages(error: Exception) -> list[str]:
    """The messages of an error, safe to print."""
    return [sanitize(each) for each in (error.messages if isinstance(error, UserError) else (error,))]


def print_line(line: object, style: str = "", console: Console | None = None) -> None:
    """Print a line on standard output. Long lines are wrapped by the terminal."""
    (console or Console()).print(Text(sanitize(line), style), soft_wrap=True)


def print_plain(line: object, *, to_stderr: bool) -> None:
    """Print a line at once, without Rich: on standard output, or on standard error if standard output is JSON."""
    print(sanitize(line), file=sys.stderr if to_stderr else sys.stdout, flush=True)


def print_json(value: Any) -> None:
    """Print JSON on standard output. JSON escapes control characters itself."""
    print(without_tokens(json.dumps(value)))


def print_text(text: str) -> None:
    """Print several lines on standard output."""
    print("\n".join(map(sanitize, text.split("\n"))))


def print_traceback(error: BaseException) -> None:
    """Print an error with its traceback on standard error."""
    print(_format_traceback(error), file=sys.stderr)


def sanitize_other_libraries() -> None:
    """Sanitize the warnings and log records of other libraries too, for any log handler."""
    logging.setLogRecordFactory(_SanitizedRecord)
    warnings.formatwarning = _format_warning


class _SanitizedRecord(logging.LogRecord):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.exc_info and self.exc_info[1]:
            self.exc_text = _format_traceback(self.exc_info[1])  # formatters use it unchanged

    def getMessage(self) -> str:  # noqa: N802 (logging's name)
        return sanitize(super().getMessage())


def _format_traceback(error: BaseException) -> str:
    """Several lines; lines that look like messages of sslkit are indented, so that an error cannot imitate them."""
    lines = "".join(traceback.format_exception(error)).rstrip("\n").split("\n")
    return "\n".join(f"  {sanitize(each)}" if each.startswith("sslkit:") else sanitize(each) for each in lines)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    del line  # the source line does not help a user
    return f"{sanitize(filename)}:{lineno}: {category.__name__}: {sanitize(message)}\n"


class PlainTable(Table):
    """A table whose text is sanitized and not read as Rich's markup."""

    def __init__(self, *headers: str, title: str | None = None) -> None:
        super().__init__(title=title)
        for header in headers:
            self.add_column(header)

    def add_column(self, header: Any = "", *args: Any, **options: Any) -> None:
        """As in Rich."""
        super().add_column(Text(sanitize(header)), *args, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """As in Rich."""
        super().add_row(*(Text(sanitize(each)) if isinstance(each, str) else each for each in cells), **options)
