"""``sslkit replay``: a bad step, computed again at a desk."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from sslkit.cli.output import AsJson, console
from sslkit.cli.startup import quick_imports
from sslkit.terminal import PlainTable, show, show_json

if TYPE_CHECKING:
    from sslkit.engine.replay import Replay

SHOWN = 8


def replay(
    capsule: Annotated[str, typer.Argument(help="Folder in a run's capsules/.")],
    as_json: AsJson = False,
) -> None:
    """Compute a step that was refused again, on the CPU, and say where its numbers go wrong.

    Needs the run's images where they were. Changes nothing.
    """
    with quick_imports():
        from sslkit.engine.replay import replay_step

    found = replay_step(capsule)
    if as_json:
        show_json(_plain(found))
        return
    show(f"step {found.step}: {found.complaint}")
    table = PlainTable("", "then", "now")
    for name, value in found.then.items():
        table.add_row(name.replace("_", " "), f"{value:.9g}", f"{found.now[name]:.9g}")
    console.print(table)
    show("the same numbers, bit for bit" if found.same else "not the same numbers, bit for bit")
    for remark in found.remarks:
        show(f"note: {remark}")
    if found.culprit:
        show(f"first output that is not finite: {found.culprit}")
    if found.bad_samples:
        show(f"in it, the rows of images {_few(found.bad_samples)} (positions in the data)")
    if found.bad_gradients:
        show(f"{len(found.bad_gradients)} gradients that are not finite: {_few(found.bad_gradients)}")


def _plain(found: "Replay") -> dict[str, object]:
    """For JSON, which has no word for what is not a number: those become strings."""
    fields = dataclasses.asdict(found)
    for when in ("then", "now"):
        fields[when] = {name: repr(value) for name, value in fields[when].items()}
    return {**fields, "same": found.same}


def _few(items: "list[int] | list[str]") -> str:
    return ", ".join(map(str, items[:SHOWN])) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")
