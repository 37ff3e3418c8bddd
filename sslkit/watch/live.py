"""Looking again and again, until the run is done or whoever looks has seen enough."""

import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from sslkit.errors import UserError, check_path
from sslkit.watch.followed_run import WatchedRun
from sslkit.watch.terminal_page import Page

SECONDS = 1.0


def watch(folder: Path, console: Console, *, once: bool = False) -> None:
    """Show a run's page and renew it every second, until the run is done; Ctrl-C ends it and disturbs nobody.

    Where there is no terminal, or once only, the page is printed as it is now.

    Args:
        folder: Run folder; on a terminal it need not be there yet.
        console: Where to show it.
        once: Do not wait for more.

    Raises:
        UserError: There is no run, or the folder holds something else or is gone.
    """
    check_path(folder, "RUN")
    run = WatchedRun(folder)
    try:
        if once or not console.is_terminal:
            while run.look():
                pass
            if run.state.word == "waiting":
                raise UserError(f"{folder}: no run here yet; on a terminal sslkit watch waits for one")
            console.print(Page(run))
            return
        with Live(console=console, auto_refresh=False) as live:
            while run.state.word != "done":
                more = run.look()
                live.update(Page(run), refresh=True)
                if not more and run.state.word != "done":
                    time.sleep(SECONDS)
    except KeyboardInterrupt:
        return
