"""What a run logs while it trains: JSON lines for programs, trackers if there are any, one progress line for people."""

import json
import math
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sslkit.engine.logging.sample_images import DrawImage
from sslkit.engine.logging.trackers import Trackers
from sslkit.errors import UserError
from sslkit.files.atomic import refuse_links
from sslkit.files.jsonl_reader import rows_of
from sslkit.files.jsonl_writer import JsonlWriter, append_text
from sslkit.progress import FIRST_SECONDS, Stage
from sslkit.terminal import print_line, sanitize

FILES = ("metrics", "results", "diagnostics")
PLAIN_SECONDS = 15.0


class RunLogger:
    """Writes ``metrics.jsonl``, ``results.jsonl`` and ``diagnostics.jsonl``, and prints progress, on the first process.

    On a terminal the progress line is redrawn in place and cut to the width of the terminal. Elsewhere (a file, a pipe)
    a line is printed every 15 seconds. Lines after ``start_step``, left by a run that was killed, are dropped.
    """

    def __init__(self, folder: Path, start_step: int, *, active: bool, console: Console | None = None) -> None:
        self.folder, self.active = folder, active
        self.console = console or Console(stderr=False)
        self.writers = {name: JsonlWriter(folder / f"{name}.jsonl", self.log_message) for name in FILES}
        self.live: Live | None = None
        self.last_plain = -math.inf
        self.method_metrics: dict[str, float] = {}  # the newest, for the progress line
        self.alarms_raised: set[str] = set()
        self.trackers: Trackers | None = None
        self.tracked_up_to = dict.fromkeys(FILES, 0.0)
        self.rewind(start_step)

    def __enter__(self) -> "RunLogger":
        if self.active and self.console.is_terminal:
            self.live = Live(Text(""), console=self.console, refresh_per_second=4, transient=False)
            self.live.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.live is not None:
            self.live.stop()
        for writer in self.writers.values():
            writer.flush()

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after ``step``, which will be made again."""
        if not self.active:
            return
        for name, writer in self.writers.items():
            latest = writer.remove_after(step, only_by="monitor" if name == "results" else None)
            self.tracked_up_to[name] = max(self.tracked_up_to[name], latest)
        rows = rows_of(self.folder / "diagnostics.jsonl", self.log_message)
        self.alarms_raised = {kind_of(str(alarm)) for row in rows for alarm in row.get("alarms", [])}

    def log_metrics(self, fields: dict[str, float]) -> None:
        """Append a line to metrics.jsonl; NaN and infinity, which JSON does not have, become null."""
        self._log("metrics", {name: value if math.isfinite(value) else None for name, value in fields.items()})

    def log_result(self, fields: dict[str, Any]) -> bool:
        """Append a line to results.jsonl; returns whether it could be written."""
        self._log("results", fields)
        return not self.writers["results"].pending

    def log_diagnostics(self, fields: dict[str, Any]) -> None:
        """Append a line to diagnostics.jsonl, and print its alarms as `log_alarms` does."""
        self._log("diagnostics", fields)
        self.log_alarms(fields["alarms"], fields["step"])

    def log_alarms(self, alarms: Iterable[str], step: int) -> None:
        """Print an alarm if it is the first of its kind in the run."""
        for alarm in alarms:
            if kind_of(alarm) not in self.alarms_raised:
                self.alarms_raised.add(kind_of(alarm))
                self.log_message(f"ALARM at step {step}: {alarm}")

    def _log(self, file: str, fields: dict[str, Any]) -> None:
        """Append a line. Trackers get it unless they were given this step before the run was rewound or killed."""
        if not self.active:
            return
        self.writers[file].append(fields)
        if self.trackers is not None and fields["step"] > self.tracked_up_to[file]:
            self.trackers.log(file, fields)

    def log_image(self, name: str, step: int, draw: DrawImage) -> None:
        """Pass an image on to the trackers that take images, unless they were given one of this step before."""
        if self.trackers is not None and (step or 1) > self.tracked_up_to["results" if step else "metrics"]:
            self.trackers.log_image(name, step, draw)

    def show_progress(self, line: str) -> None:
        """Redraw the progress line; without a terminal print it every `PLAIN_SECONDS`."""
        if self.live is not None:
            self.live.update(Text(sanitize(line), no_wrap=True, overflow="ellipsis"))
        elif self.active and time.monotonic() - self.last_plain > PLAIN_SECONDS:
            self.last_plain = time.monotonic()
            self.log_message(line)

    def show_stage(self, stage: Stage) -> None:
        """Show the progress of an evaluation in place of the progress line, if it takes more than a moment."""
        if not stage.ended and stage.seconds > (0.5 if self.live else FIRST_SECONDS):
            self.show_progress(str(stage))

    def log_message(self, message: str) -> None:
        """Print a line above the progress line; on the first process only."""
        if self.active:
            with suppress(OSError):  # standard output may be a file on a disk that is full
                print_line(message, console=self.console)


def append_result(folder: Path, fields: dict[str, Any]) -> None:
    """Append an evaluation to the results.jsonl of a run."""
    refuse_links(folder)
    try:
        append_text(folder / "results.jsonl", json.dumps(fields) + "\n")
    except OSError as error:
        raise UserError(f"{folder / 'results.jsonl'}: the score cannot be added: {error.strerror or error}") from error


def kind_of(alarm: str) -> str:
    """The kind of an alarm: the word before the colon; see `sslkit.engine.monitor.alarms`."""
    return alarm.partition(":")[0]
