"""What a run says while it trains: lines of JSON for programs, one line of text for people."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sslkit.engine.logging.sample_images import Draw
from sslkit.engine.logging.trackers import Tracks
from sslkit.errors import UserError
from sslkit.files.atomic import refuse_links
from sslkit.files.jsonl_reader import rows_of
from sslkit.files.jsonl_writer import Lines, append_text, settle_all
from sslkit.terminal import print_line, sanitize

FILES = ("metrics", "results", "diagnostics")
PLAIN_SECONDS = 15.0


class Journal:
    """Writes ``metrics.jsonl``, ``results.jsonl`` and ``diagnostics.jsonl`` and keeps one line on the screen.

    On a terminal the line is redrawn in place and cut to the width there is; elsewhere (a file, a pipe) a plain line
    is printed every 15 seconds. Only the first process has an active journal.

    Args:
        folder: Run folder.
        start_step: Lines of later steps, left by a run that was killed, are dropped.
        active: Whether this process writes at all.
        console: Where to print.
    """

    def __init__(self, folder: Path, start_step: int, *, active: bool, console: Console | None = None) -> None:
        self.folder, self.active = folder, active
        self.console = console or Console(stderr=False)
        self.metrics, self.results, self.diagnoses = (Lines(folder / f"{name}.jsonl", self.say) for name in FILES)
        self.live: Live | None = None
        self.last_plain = 0.0
        self.said: set[str] = set()
        self.tracks: Tracks | None = None
        self.reached = dict.fromkeys(FILES, 0.0)
        self.go_back(start_step)

    def __enter__(self) -> "Journal":
        if self.active and self.console.is_terminal:
            self.live = Live(Text(""), console=self.console, refresh_per_second=4, transient=False)
            self.live.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.live is not None:
            self.live.stop()
        settle_all((self.metrics, self.results, self.diagnoses))

    def go_back(self, step: int) -> None:
        """Drop the lines of later steps, which will be written again."""
        if not self.active:
            return
        for name, lines, only_by in (
            ("metrics", self.metrics, None),
            ("results", self.results, "monitor"),
            ("diagnostics", self.diagnoses, None),
        ):
            self.reached[name] = max(self.reached[name], lines.go_back(step, only_by))
        self.said = {
            kind_of(str(alarm)) for row in rows_of(self.diagnoses.file, self.say) for alarm in row.get("alarms", [])
        }

    def record(self, fields: dict[str, float]) -> None:
        """Append one line to metrics.jsonl; JSON has no word for a number that is none, so it becomes null."""
        if self.active:
            self.metrics.append({name: value if math.isfinite(value) else None for name, value in fields.items()})
            self._track("metrics", fields)

    def result(self, fields: dict[str, Any]) -> None:
        """Append one line to results.jsonl."""
        if self.active:
            self.results.append(fields)
            self._track("results", fields)

    def diagnosis(self, fields: dict[str, Any]) -> None:
        """Append one line to diagnostics.jsonl, and say each kind of alarm the first time a run has it."""
        if not self.active:
            return
        self.diagnoses.append(fields)
        self._track("diagnostics", fields)
        self.warn(fields["alarms"], fields["step"])

    def warn(self, alarms: Iterable[str], step: int) -> None:
        """Say alarms, each kind the first time a run has it."""
        for alarm in alarms:
            if kind_of(alarm) not in self.said:
                self.said.add(kind_of(alarm))
                self.say(f"ALARM at step {step}: {alarm}")

    def _track(self, file: str, fields: Mapping[str, Any]) -> None:
        """Tell the trackers; they cannot take back what a run that went back, or was killed, has told them before."""
        if self.tracks is not None and fields["step"] > self.reached[file]:
            self.tracks.log(file, fields)

    @property
    def shows_pictures(self) -> bool:
        """Whether there is a tracker to show pictures to."""
        return self.tracks is not None and self.tracks.shows_pictures

    def picture(self, name: str, step: int, draw: Draw) -> None:
        """Show the trackers a picture, unless they have been told of this step before."""
        if self.tracks is not None and (step or 1) > self.reached["results" if step else "metrics"]:
            self.tracks.show(name, step, draw)

    def show(self, line: str) -> None:
        """Redraw the progress line, or print it now and then where there is no terminal."""
        if self.live is not None:
            self.live.update(Text(sanitize(line), no_wrap=True, overflow="ellipsis"))
        elif self.active and time.monotonic() - self.last_plain > PLAIN_SECONDS:
            self.last_plain = time.monotonic()
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        if self.active:
            with suppress(OSError):  # standard output may be a file on the disk that is full
                print_line(line, console=self.console)


def append_result(folder: Path, fields: dict[str, Any]) -> None:
    """Append one evaluation to a run's results.jsonl."""
    refuse_links(folder)
    try:
        append_text(folder / "results.jsonl", json.dumps(fields) + "\n")
    except OSError as error:
        raise UserError(f"{folder / 'results.jsonl'}: the score cannot be added: {error.strerror or error}") from error


def kind_of(alarm: str) -> str:
    """The word that an alarm's sentence opens with; see `sslkit.engine.monitor.alarms`."""
    return alarm.partition(":")[0]
