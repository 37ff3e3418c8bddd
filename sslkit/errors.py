"""The one exception a user sees: a sentence that says what is wrong, where, and what would be right."""

import difflib
import os
import re
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The doors print it as one sentence and exit with code 2.

    A DataLoader makes a worker's error anew from the text of its traceback, of which only the sentence is kept.

    Attributes:
        sentences: One for each mistake; each is printed on a line of its own.
    """

    def __init__(self, *sentences: str) -> None:
        first = sentences[0] if sentences else ""
        if first.startswith("Caught ") and " in DataLoader worker process " in first:
            sentences = (first.strip().splitlines()[-1].partition(": ")[2],)
        self.sentences = sentences
        super().__init__("\n".join(sentences))


class RunError(RuntimeError):
    """A run that cannot go on through no fault of the input. The doors print one sentence and exit with code 1."""


def near_miss(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, at most ``limit`` characters; the error's type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]


def path_fault(path: str | os.PathLike[str], *, lines: bool = False) -> str:
    """What keeps a path from being written down in recipes, results and pages as it is; empty if nothing does.

    Args:
        path: Of a file or folder, or a word that may name one.
        lines: Whether it may have line breaks, as words that are no path may.
    """
    text = os.fspath(path)
    if "\0" in text:
        what = "has a NUL character"
    elif text.encode(errors="replace").decode() != text:
        what = "is not valid UTF-8"
    elif not lines and text.splitlines() not in ([], [text]):
        what = "has a line break"
    else:
        return ""
    shown = "".join(char if char.isprintable() else _escaped(char) for char in text)
    return f"{shown} {what}; rename the file or folder, and give its new name"


def check_path(path: str | os.PathLike[str], where: str, *, lines: bool = False) -> None:
    """Refuse a path that could not be written down as it is, before anything is read or written.

    Args:
        path: See `path_fault`.
        where: Argument or key; opens the sentence.
        lines: See `path_fault`.

    Raises:
        UserError: It is not valid UTF-8, or has a NUL character or a line break.
    """
    if fault := path_fault(path, lines=lines):
        raise UserError(f"{where}: {fault}")


def _escaped(char: str) -> str:
    """A byte of a path that is not UTF-8, or another character that is not printable, in ASCII."""
    byte = 0xDC80 <= ord(char) <= 0xDCFF
    return f"\\x{ord(char) & 0xFF:02x}" if byte else char.encode("unicode_escape").decode()


# Every repetition is bounded, so that no text takes long.
TOKENS = (
    r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{16,}|hf_[A-Za-z0-9]{30,}",  # Hugging Face
    r"gh[opsur]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}",  # GitHub
    r"(?<![A-Za-z0-9])A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9])",  # AWS
    r"xox[a-z]-[A-Za-z0-9-]{10,}",  # Slack
)
# What stands before each tells that it is one, and stays.
TOKENS_AFTER = (
    r"((?i:(?<![a-z])(?:api|key)(?![a-z]))[^\n]{0,16}?(?<![0-9a-zA-Z]))[0-9a-f]{40}(?![0-9a-zA-Z])",  # Weights & Biases
    r"((?i:\bbearer[ \t]+))(?:(?=[^\s\"']{0,200}[0-9])[\w.~+/=-]{8,}|[\w.~+/=-]{20,})",
    r"((?i:\b[a-z][a-z0-9+.-]{0,20}://))[^\s/@:]{0,200}:[^\s/]{1,500}(?=@)",  # user:password@host
)
TOKEN = re.compile("|".join(TOKENS))
TOKEN_AFTER = re.compile("|".join(TOKENS_AFTER))
TOKEN_VARIABLES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"),
    *("GITHUB_TOKEN", "GH_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)


def without_tokens(text: str) -> str:
    """The text with every access token and password in it struck out: those of known forms, and the environment's."""
    for name in TOKEN_VARIABLES:
        if len(token := os.environ.get(name, "")) >= 8:
            text = text.replace(token, f"[{name}]")
    text = TOKEN.sub("[token]", text)
    return TOKEN_AFTER.sub(lambda found: f"{next(filter(None, found.groups()))}[token]", text)
