"""The errors that a user sees: one sentence that says what is wrong, where, and what would be right."""

import difflib
import os
import re
from collections.abc import Iterable

from sslkit.text import escape


class UserError(ValueError):
    """Bad input. The command line prints its messages and exits with code 2.

    ``messages`` has one sentence per mistake. A DataLoader raises the error of a worker again with its traceback as
    text; only the message of it is kept.
    """

    def __init__(self, *messages: str) -> None:
        first = messages[0] if messages else ""
        if first.startswith("Caught ") and " in DataLoader worker process " in first:
            messages = (first.strip().splitlines()[-1].partition(": ")[2],)
        self.messages = messages
        super().__init__("\n".join(messages))


class RunError(RuntimeError):
    """A run cannot continue although its input is valid. The command line prints one sentence and exits with code 1."""


def near_miss(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


NO_MEMORY = (  # what libraries write into a RuntimeError
    *("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory"),
    *("CUDA out of memory", "CUDA error: out of memory", "MPS backend out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory of the machine or of a GPU ran out."""
    of_torch = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    by_words = isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    return isinstance(error, MemoryError) or of_torch or by_words


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, at most ``limit`` characters; the error's type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]


def path_problem(path: str | os.PathLike[str], *, lines: bool = False) -> str:
    """Why a path cannot be written to recipes, results and pages; empty if it can.

    ``lines`` allows line breaks, as in command-line arguments that are not paths.
    """
    text = os.fspath(path)
    if "\0" in text:
        problem = "has a NUL character"
    elif text.encode(errors="replace").decode() != text:
        problem = "is not valid UTF-8"
    elif not lines and text.splitlines() not in ([], [text]):
        problem = "has a line break"
    else:
        return ""
    return f"{escape(text)} {problem}; rename the file or folder, and give its new name"


def check_path(path: str | os.PathLike[str], where: str, *, lines: bool = False) -> None:
    """Refuse a path that has a `path_problem` with a UserError, before anything is read or written.

    ``where`` is the argument or key that gave the path.
    """
    if problem := path_problem(path, lines=lines):
        raise UserError(f"{where}: {problem}")


# All repetitions are bounded, so that matching is fast for any text.
TOKENS = (
    r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{16,}|hf_[A-Za-z0-9]{30,}",  # Hugging Face
    r"gh[opsur]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}",  # GitHub
    r"(?<![A-Za-z0-9])A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9])",  # AWS
    r"xox[a-z]-[A-Za-z0-9-]{10,}",  # Slack
)
# Tokens that are recognised by the text before them, which is kept.
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
    """Replace access tokens and passwords: those of known formats, and those in environment variables."""
    for name in TOKEN_VARIABLES:
        if len(token := os.environ.get(name, "")) >= 8:
            text = text.replace(token, f"[{name}]")
    text = TOKEN.sub("[token]", text)
    return TOKEN_AFTER.sub(lambda found: f"{next(filter(None, found.groups()))}[token]", text)
