"""``sslkit watch``: a page in the terminal about a run in another process."""

from pathlib import Path
from typing import Annotated

import typer

from sslkit.cli.output import console


def watch(
    run: Annotated[str, typer.Argument(help="Run folder; it need not be there yet.")],
    once: Annotated[bool, typer.Option("--once", help="Print the page as it is now, and end.")] = False,
) -> None:
    """Show how a run in another process is doing, live, until it is done; Ctrl-C leaves it alone.

    Nothing is written into the run folder. Where the output is no terminal, the page is printed once.
    """
    from sslkit.watch import watch as show

    show(Path(run), console, once=once)
