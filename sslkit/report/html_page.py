"""Self-contained HTML pages: the report of one or several runs, and the views of a recipe."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

import sslkit
from sslkit.errors import UserError, check_path, without_tokens
from sslkit.files.atomic import write_output
from sslkit.recipe.resolve import Recipe, changes
from sslkit.report.accuracy_figures import accuracy_panel, score_rows
from sslkit.report.gallery.run_gallery import draw_gallery
from sslkit.report.gallery.view_gallery import draw_views
from sslkit.report.health_figures import collapse_panels, gradient_panel
from sslkit.report.run_record import RunRecord
from sslkit.report.summary import Summary, facts
from sslkit.report.training_figures import training_panels

SECTIONS = ("Accuracy", "Training", "Health", "Galleries", "Facts")


def write_report(
    runs: Sequence[RunRecord],
    summaries: Sequence[Summary],
    file: Path,
    *,
    galleries: bool = True,
    data: str = "",
    split: str = "train",
) -> None:
    """Write the report of runs and their `summarise` as one HTML file.

    ``galleries`` are images, and need the encoders and the data of the runs. Neighbours are searched in a split of
    ``data``, by default in the images of the monitor, or the training images. Raises `UserError` if ``data`` cannot be
    read or ``file`` cannot be written.
    """
    _check_output(file)
    scores = score_rows(runs)
    titles = ["Gradients by layer" if len(runs) == 1 else f"Gradients by layer, {run.name}" for run in runs]
    _write(
        file,
        "report.html",
        title=", ".join(run.name for run in runs),
        sections=SECTIONS,
        runs=[
            {"summary": summary, "facts": facts(run, summary), "toml": run.recipe.to_toml()}
            for run, summary in zip(runs, summaries, strict=True)
        ],
        training=training_panels(runs),
        accuracy=accuracy_panel(runs),
        scores=scores,
        has_intervals=any(row["interval"] for row in scores),
        health=[gradient_panel(run, title) for run, title in zip(runs, titles, strict=True)] + collapse_panels(runs),
        galleries=[draw_gallery(run, data, split) for run in runs] if galleries else [],
        differences=[(run.name, changes(runs[0].recipe.as_tables(), run.recipe.as_tables())) for run in runs[1:]],
        plotly=Markup(get_plotlyjs()),
    )


def write_views(recipe: Recipe, name: str, file: Path) -> None:
    """Write augmented views of a recipe's images as one HTML file that shows ``name``. Raises as `write_report`."""
    _check_output(file)
    _write(file, "views.html", title=f"Views of {name}", gallery=draw_views(recipe))


def _check_output(file: Path) -> None:
    """Refuse a file that cannot be written, before any work is done."""
    check_path(file, "--output")
    if file.is_dir():
        raise UserError(f"--output {file}: is a folder; give a file, such as {file / 'report.html'}")
    if not file.absolute().parent.is_dir():
        raise UserError(f"--output {file}: folder {file.parent} does not exist")


def _write(file: Path, template: str, **values: Any) -> None:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sslkit.report"),
        autoescape=True,
        finalize=lambda value: without_tokens(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": lambda value: "-" if value is None else f"{value:.4g}",
        "percent": lambda value: "-" if value is None else f"{value:.1%}",
    }
    text = environment.get_template(template).render(
        version=sslkit.__version__,
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        **values,
    )
    try:
        write_output(file, text)
    except OSError as error:
        raise UserError(f"--output {file}: cannot be written: {error.strerror}") from error
