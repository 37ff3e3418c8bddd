"""Pages that are whole in one file: the report of one or several runs, and a recipe's views."""

import datetime
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

import sslkit
from sslkit.errors import UserError, check_path, without_tokens
from sslkit.files.atomic import write_output
from sslkit.recipe.resolve import Recipe
from sslkit.report.curves import accuracy_panel, score_rows, training_panels
from sslkit.report.galleries import draw_galleries
from sslkit.report.health import collapse_panels, gradient_panel
from sslkit.report.run_reader import RunRecord
from sslkit.report.summary import Summary, differences, facts
from sslkit.report.view_gallery import draw_views

SECTIONS = (
    ("accuracy", "Accuracy"),
    ("training", "Training"),
    ("health", "Health"),
    ("galleries", "Galleries"),
    ("facts", "Facts"),
)


def write_report(
    runs: Sequence[RunRecord],
    summaries: Sequence[Summary],
    file: Path,
    *,
    galleries: bool = True,
    data: str = "",
    split: str = "train",
) -> None:
    """Write the report of one or several runs as one HTML file.

    Args:
        runs: What `read_runs` returned.
        summaries: A `summarise` of each.
        file: Where to write.
        galleries: Whether to look at images, which needs the runs' encoders and data.
        data: Images to look for neighbours in; empty takes the monitor's, else the run's own.
        split: Of ``data``.

    Raises:
        UserError: ``data`` cannot be read, or ``file`` not written.
    """
    check_output(file)
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
        galleries=[draw_galleries(run, data, split) for run in runs] if galleries else [],
        differences=differences(list(runs)),
        plotly=Markup(get_plotlyjs()),
    )


def write_views(recipe: Recipe, name: str, file: Path) -> None:
    """Write what a recipe's augmentations do to its images as one HTML file.

    Args:
        recipe: Names images and views.
        name: What to call the recipe.
        file: Where to write.

    Raises:
        UserError: The data cannot be read, or ``file`` not written.
    """
    check_output(file)
    _write(file, "views.html", title=f"Views of {name}", gallery=draw_views(recipe))


def check_output(file: Path) -> None:
    """See that a page can be written to ``file``, before the work is done.

    Raises:
        UserError: It is a folder, or lies in none.
    """
    check_path(file, "--output")
    if file.is_dir():
        raise UserError(f"--output {file}: is a folder; name a file, such as {file / 'report.html'}")
    if not file.absolute().parent.is_dir():
        raise UserError(f"--output {file}: there is no folder {file.parent} to write to")


def _write(file: Path, template: str, **words: Any) -> None:
    folder = resources.files("sslkit.report") / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        finalize=lambda value: without_tokens(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = _share
    environment.globals |= {"number": _number, "share": _share}
    text = environment.get_template(template).render(
        version=sslkit.__version__,
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        css=Markup((folder / "page.css").read_text(encoding="utf-8")),
        js=Markup((folder / "page.js").read_text(encoding="utf-8")),
        **words,
    )
    try:
        write_output(file, text)
    except OSError as error:
        raise UserError(f"--output {file}: cannot be written: {error.strerror}") from error


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
