"""The command line of this process, for messages that end in a command to paste."""

import itertools
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_words: ContextVar[tuple[str, ...]] = ContextVar("words", default=())


@contextmanager
def running(words: Sequence[str]) -> Iterator[None]:
    """Record the words after ``sslkit`` of the command that runs in the block."""
    token = _words.set(tuple(words))
    try:
        yield
    finally:
        _words.reset(token)


def same_command(*, output: str = "", resume: str = "", overrides: Sequence[str] = (), python: str = "") -> str:
    """The command that is running, with another ``--output`` and ``--resume`` and more ``--set``, to be pasted.

    Under a launcher, whose words are not known, and for commands other than ``pretrain`` it names the options to add.
    From Python it is ``python``, or else a call of `sslkit.train`.
    """
    given = {"--output": str(output), "--resume": str(resume)}
    options = [word for name, value in given.items() if value for word in (name, value)]
    options += [word for override in overrides for word in ("--set", override)]
    words = _words.get()
    if not words and python:
        return python
    if not words:
        arguments = [repr(str(output)) if output else "output", *([f"resume={str(resume)!r}"] if resume else [])]
        also = f" with {', '.join(overrides)} in the recipe" if overrides else ""
        return f"sslkit.train(recipe, {', '.join(arguments)}){also}"
    if words[0] == "pretrain" and "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join(["sslkit", *_without(words, given, overrides), *options])
    if words[0] != "pretrain" and not resume:
        return shlex.join(["sslkit", *_without(words, given, overrides), *options])
    opening = "the same command" if words[0] == "pretrain" else "sslkit pretrain"
    return f"{opening} with {shlex.join(options)}"


def _without(words: Sequence[str], options: dict[str, str], overrides: Sequence[str]) -> list[str]:
    """The words without those options that get a new value, and without ``--set`` of the same keys."""
    keys = {override.partition("=")[0] for override in overrides}
    kept: list[str] = []
    following = iter(words)
    for word in following:
        name, equals, value = word.partition("=")
        takes_next = not equals and (name == "--set" or name in options)
        if takes_next:
            value = next(following, "")
        replaced = value.partition("=")[0].strip() in keys if name == "--set" else bool(options.get(name))
        if not replaced:
            kept += [word, value] if takes_next else [word]
    return kept


def free_folder(folder: Path) -> str:
    """The first of NAME-2, NAME-3 and so on that does not exist."""
    name = re.sub(r"-\d+$", "", folder.name) or folder.name
    return next(str(each) for n in itertools.count(2) if not (each := folder.with_name(f"{name}-{n}")).exists())
