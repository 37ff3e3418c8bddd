"""The live page: read what is new, draw, wait, until the run is done or the user presses Ctrl-C."""

import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.live import Live

from sslkit.errors import UserError
from sslkit.watch.terminal_page import Page
from sslkit.watch.watched_run import WatchedRun

REFRESH_SECONDS = 1.0


def watch(folder: Path, console: Console, *, once: bool = False) -> None:
    """Show the page of a run and refresh it every second until the run is done. Ctrl-C closes it; the run goes on.

    Prints the page once if ``once`` is set or ``console`` is not a terminal. Else the run may not exist yet. Raises
    `UserError` if there is no run, or if the folder holds something else or has vanished.
    """
    run = WatchedRun(folder)
    with suppress(KeyboardInterrupt):
        if once or not console.is_terminal:
            while run.read_new():
                pass
            if run.state.name == "waiting":
                raise UserError(f"{folder}: no run here yet; start one with sslkit pretrain RECIPE --output {folder}")
            console.print(Page(run))
            return
        with Live(console=console, auto_refresh=False) as live:
            while run.state.name != "done":
                more = run.read_new()
                live.update(Page(run), refresh=True)
                if not more and run.state.name != "done":
                    time.sleep(REFRESH_SECONDS)
