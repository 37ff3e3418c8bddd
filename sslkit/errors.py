"""The one exception a user sees: a sentence that says what is wrong, where, and what would be right."""

import difflib
import os
import re
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The doors print it as one sentence and exit with code 2.

    A DataLoader makes a worker's error anew from the text of its traceback, of which only the sentence is kept.
    """

    def __init__(self, sentence: str = "") -> None:
        if sentence.startswith("Caught ") and " in DataLoader worker process " in sentence:
            sentence = sentence.strip().splitlines()[-1].partition(": ")[2]
        super().__init__(sentence)


class RunError(RuntimeError):
    """A run that cannot go on through no fault of the input. The doors print one sentence and exit with code 1."""


def near_miss(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN")


def without_tokens(text: str) -> str:
    """The text with every access token in it struck out: Hugging Face's, and those of the environment."""
    for name in TOKEN_VARIABLES:
        if len(token := os.environ.get(name, "")) >= 8:
            text = text.replace(token, f"[{name}]")
    return TOKEN.sub("[token]", text)
