"""``sslkit report`` and ``sslkit views``: pages to look at, and a few numbers for those who stay in the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslkit.cli.options import Backbone, Images, MethodName, Overrides, RecipeName, recipe_from_words
from sslkit.cli.output import console
from sslkit.cli.startup import quick_imports
from sslkit.errors import UserError
from sslkit.terminal import PlainTable, say, show

if TYPE_CHECKING:
    from sslkit.report import Summary


def report(
    runs: Annotated[list[str], typer.Argument(help="Run folders.", metavar="RUN...")],
    output: Annotated[str, typer.Option(help="HTML file to write. Default, for one run: RUN/report.html.")] = "",
    data: Annotated[
        str, typer.Option(help="Labelled images for the galleries. Default: the monitor's, else the run's own.")
    ] = "",
    gallery: Annotated[bool, typer.Option(help="Look at images, with the encoder's features of at most 2000.")] = True,
) -> None:
    """Write one HTML page about a run, or about several side by side, that opens anywhere, offline.

    For a single run the pictures of its curves and views are written too, as PNG.
    """
    with quick_imports():
        from sslkit.report import draw_run, read_runs, summarise, write_report

    if len(runs) > 1 and not output:
        raise UserError("--output: needed for several runs; give the HTML file to write, such as --output report.html")
    records = read_runs([Path(run) for run in runs])
    summaries = [summarise(record) for record in records]
    file = Path(output) if output else records[0].folder / "report.html"
    write_report(records, summaries, file, galleries=gallery, data=data)
    written = [file]
    try:
        written += draw_run(records[0].folder) if len(records) == 1 else []
    except UserError as error:  # the page is there; a run on a read-only disk has no place for its pictures
        say(f"WARNING: {error}")
    _print_summaries(summaries)
    for path in written:
        show(path)


def views(
    recipe: RecipeName = "",
    overrides: Overrides = None,
    method: MethodName = "",
    backbone: Backbone = "",
    data: Images = "",
    output: Annotated[str, typer.Option(help="HTML file to write.")] = "views.html",
) -> None:
    """Write one HTML page of what a recipe's augmentations do to its images, with every step in words.

    Give a recipe, or all of --method, --backbone and --data, as for pretrain.
    """
    from sslkit.report import write_views

    loaded = recipe_from_words(recipe, overrides or [], method, backbone, data)
    name = Path(recipe).stem if recipe else f"{loaded.method_name}_{loaded.backbone.name}"
    write_views(loaded, name, Path(output))
    show(output)


def _print_summaries(summaries: list["Summary"]) -> None:
    table = PlainTable("run", "epoch", "last loss", "chance", "pretext accuracy", "kNN first -> best -> last")
    for its in summaries:
        table.add_row(
            its.name,
            f"{its.epoch:g} of {its.epochs}",
            "-" if its.loss is None else f"{its.loss:.4g}",
            "not known" if its.chance is None else f"{its.chance:.4g}",
            "-" if its.accuracy is None else f"{its.accuracy:.1%}",
            " -> ".join(f"{value:.1%}" for value in its.knn) if its.knn else "not monitored",
        )
    console.print(table)
    for alarm in (alarm for its in summaries for alarm in its.alarms):
        when = f"epoch {alarm.first:.3g}" + (f" to {alarm.last:.3g}" if alarm.last > alarm.first else "")
        colour = "bold red" if alarm.active else "yellow"
        show(f"alarm, {alarm.run}, {when}: {alarm.message}", colour)
