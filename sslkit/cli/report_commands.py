"""``sslkit report``, ``views`` and ``watch``: pages about runs and recipes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslkit.cli.options import RecipeOptions, fast_imports
from sslkit.cli.output import console
from sslkit.errors import UserError
from sslkit.terminal import PlainTable, print_line, print_message

if TYPE_CHECKING:
    from sslkit.report import Summary


def report(
    runs: Annotated[list[str], typer.Argument(help="Run folders.", metavar="RUN...")],
    output: Annotated[str, "HTML file to write. Default for one run: RUN/report.html."] = "",
    data: Annotated[str, "Images for the galleries. Default: the monitor's data, else the training images."] = "",
    split: Annotated[str, "Split of --data; all: all images, whatever the names of the folders. Default: train."] = "",
    gallery: Annotated[bool, "Show images; needs features of up to 2000 images."] = True,
) -> None:
    """Write an HTML report about one run, or several runs side by side. The file works offline.

    For a single run, PNG pictures of its curves and views are written too.
    """
    with fast_imports():
        from sslkit.report import draw_run, read_runs, summarise, write_report

    if len(runs) > 1 and not output:
        raise UserError("--output: needed for several runs; give the HTML file to write, such as --output report.html")
    if split and not data:
        raise UserError("--split: is the split of --data; give --data DIR too, or remove --split")
    records = read_runs([Path(run) for run in runs])
    summaries = [summarise(record) for record in records]
    file = Path(output) if output else records[0].folder / "report.html"
    write_report(records, summaries, file, galleries=gallery, data=data, split=split or "train")
    written = [file]
    try:
        written += draw_run(records[0].folder) if len(records) == 1 else []
    except UserError as error:  # the run folder is read-only; the report is written already
        print_message(f"WARNING: {error}")
    _print_summaries(summaries)
    for path in written:
        print_line(path)


def _print_summaries(summaries: list["Summary"]) -> None:
    table = PlainTable("run", "epoch", "last loss", "chance", "pretext accuracy", "kNN first -> best -> last")
    for summary in summaries:
        table.add_row(
            summary.name,
            f"{summary.epoch:g} of {summary.epochs}",
            "-" if summary.loss is None else f"{summary.loss:.4g}",
            "unknown" if summary.chance is None else f"{summary.chance:.4g}",
            "-" if summary.accuracy is None else f"{summary.accuracy:.1%}",
            " -> ".join(f"{value:.1%}" for value in summary.knn) if summary.knn else "not monitored",
        )
    console.print(table)
    for summary in summaries:
        name = f", {summary.name}" if len(summaries) > 1 else ""
        for verdict in summary.verdicts:
            print_line(f"verdict{name}: {verdict}")
    for alarm in (alarm for summary in summaries for alarm in summary.alarms):
        when = f"epoch {alarm.first:.3g}" + (f" to {alarm.last:.3g}" if alarm.last > alarm.first else "")
        print_line(f"alarm, {alarm.run}, {when}: {alarm.message}", "bold red" if alarm.active else "yellow")


def views(recipe: RecipeOptions, output: Annotated[str, "HTML file to write."] = "views.html") -> None:
    """Write an HTML page of a recipe's augmented views, with a description of every transform.

    Give a recipe, or only --data, for the views of a plan, as for pretrain.
    """
    from sslkit.report import write_views

    loaded = recipe.load()
    write_views(loaded, recipe.name(), Path(output))
    print_line(output)


def watch(
    run: Annotated[str, typer.Argument(help="Run folder; it may not exist yet.")],
    once: Annotated[bool, typer.Option("--once", help="Print the page once and exit.")] = False,
) -> None:
    """Show the progress of a run in another process, live, until it is done. Ctrl-C closes the page; the run goes on.

    Writes nothing into the run folder. If the output is not a terminal, the page is printed once.
    """
    from sslkit.watch import watch as watch_run

    watch_run(Path(run), console, once=once)
