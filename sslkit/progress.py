"""Progress of work that may take long: a bar on a terminal, elsewhere a line every few seconds, on standard error.

Functions of all rooms open stages. Nothing is shown unless a caller, such as the command line, shows them:

    with show_stages():
        with stage("features", len(images), "image") as advance:
            advance(256)
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sslkit.terminal import print_message, sanitize
from sslkit.text import format_duration, pluralize

BAR_SECONDS = 0.5  # shorter stages show no bar
FIRST_SECONDS, NEXT_SECONDS = 5.0, 15.0  # after which a stage has its first line, and between its lines
MAX_DESCRIPTION = 40  # characters beside a bar


@dataclass
class Stage:
    """Work of a known number of units, of which ``done`` are done."""

    what: str
    total: int
    unit: str  # singular
    done: int = 0
    ended: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Time since the stage started."""
        return time.monotonic() - self.started

    def __str__(self) -> str:
        """One line: what is done, and the time that is left at the speed so far."""
        left = self.seconds * (self.total - self.done) / self.done if self.done else 0.0
        known = f", {format_duration(left)} left" if self.done else ""
        return f"{self.what}: {self.done} of {pluralize(self.total, self.unit)}{known}"


Item = TypeVar("Item")
Display = Callable[[Stage], None]  # called when a stage starts, moves and ends

_display: ContextVar[Display | None] = ContextVar("display", default=None)
_group: ContextVar[str] = ContextVar("group", default="")


@contextmanager
def stage(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A stage of ``total`` units, such as images; yields a function that is called with the number of units done."""
    display = _display.get()
    if display is None:
        yield lambda _count: None
        return
    current = Stage(f"{_group.get()}{what}", total, unit)
    display(current)

    def advance(count: int) -> None:
        current.done += count
        display(current)

    try:
        yield advance
    finally:
        current.ended = True
        display(current)


def track(items: Iterable[Item], what: str, unit: str, total: int = 0) -> Iterator[Item]:
    """Yield the items as a stage; ``total`` is needed if they have no length."""
    with stage(what, total or len(items), unit) as advance:  # type: ignore[arg-type]
        for item in items:
            yield item
            advance(1)


@contextmanager
def group(name: str) -> Iterator[None]:
    """Put a name, such as that of an encoder, before the stages of the block."""
    token = _group.set(f"{_group.get()}{name}: ")
    try:
        yield
    finally:
        _group.reset(token)


@contextmanager
def show_with(display: Display) -> Iterator[None]:
    """Show the stages of the block with ``display``."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


@contextmanager
def show_stages() -> Iterator[None]:
    """Show the stages of the block on standard error; of several processes, the first one's."""
    if os.environ.get("RANK", "0") != "0":
        yield
    elif sys.stderr.isatty():
        with show_with(_Bars()):
            yield
    else:
        with show_with(_Lines()):
            yield


class _Lines:
    """A line of a stage after `FIRST_SECONDS`, then every `NEXT_SECONDS`."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, current: Stage) -> None:
        if current.seconds < FIRST_SECONDS or current.ended or time.monotonic() - self.last < NEXT_SECONDS:
            return
        self.last = time.monotonic()
        print_message(current)


class _Bars:
    """A bar for each stage that is not over, below what is printed."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.tasks: dict[int, TaskID] = {}

    def __call__(self, current: Stage) -> None:
        if current.ended:
            self._remove(current)
        elif id(current) in self.tasks:
            assert self.progress is not None
            self.progress.update(self.tasks[id(current)], completed=current.done)
        elif current.seconds > BAR_SECONDS:
            self._add(current)

    def _add(self, current: Stage) -> None:
        if self.progress is None:
            columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
            options = {"console": Console(stderr=True), "transient": True, "redirect_stdout": False}
            self.progress = Progress(*columns, TimeRemainingColumn(compact=True), **options)  # type: ignore[arg-type]
            self.progress.start()
        description = sanitize(current.what)
        if len(description) > MAX_DESCRIPTION:
            description = f"…{description[1 - MAX_DESCRIPTION :]}"
        task = self.progress.add_task(description, total=current.total, completed=current.done)
        self.tasks[id(current)] = task

    def _remove(self, current: Stage) -> None:
        task = self.tasks.pop(id(current), None)
        if task is None or self.progress is None:
            return
        self.progress.remove_task(task)
        if not self.tasks:
            self.progress.stop()
            self.progress = None
