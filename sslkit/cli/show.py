"""What commands print: tables, or JSON for programs."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from sslkit.doctor import Report
    from sslkit.evaluate.judge import Judgement

console = Console()

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def show_report(report: "Report", as_json: bool) -> None:
    """Print an examination: what applies as a table, the worst first; all of it, in its own order, as JSON."""
    counts = {verdict: len(report.of(verdict)) for verdict in ("fault", "warning", "ok")}
    if as_json:
        print(json.dumps({**counts, "findings": [dataclasses.asdict(finding) for finding in report.findings]}))
        return
    colours = {"fault": "bold red", "warning": "yellow", "ok": "green"}
    table = Table("check", "verdict", "what was seen")
    for finding in [*report.of("fault"), *report.of("warning"), *report.of("ok")]:
        table.add_row(finding.check, Text(finding.verdict, colours[finding.verdict]), Text(finding.sentence))
    console.print(table)
    absent = [finding.check for finding in report.of("not applicable")]
    console.print("not applicable here: " + (", ".join(absent) or "none"), highlight=False)
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), highlight=False)


def conclude(model: str, judgement: "Judgement", as_json: bool) -> None:
    """Print a judgement and, if the model is a run, add it to the run's results."""
    from sslkit.engine.journal import append_result

    fields: dict[str, Any] = dataclasses.asdict(judgement)
    if (Path(model) / "recipe.toml").is_file() and (Path(model) / "encoder").is_dir():
        own = judgement.scores[0]
        row = {"by": "eval", "evaluation": judgement.evaluation, "data": judgement.data, "accuracy": own.accuracy}
        row["measure"] = judgement.measure
        latest = (Path(model) / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
        step = int(latest.removeprefix("step-"))
        append_result(Path(model), {"step": step, **row, "protocol": judgement.protocol, "scores": fields["scores"]})
    if as_json:
        print(json.dumps(fields))
        return
    console.print(f"{judgement.evaluation}, {judgement.data}", highlight=False, markup=False)
    with_notes = any(score.note for score in judgement.scores)
    measures = list(judgement.scores[0].measures) or [judgement.measure]
    table = Table("encoder", *measures, *(["chosen"] if with_notes else []))
    for score in judgement.scores:
        numbers = [f"{value:.2%}" for value in score.measures.values() or [score.accuracy]]
        table.add_row(score.encoder, *numbers, *([score.note] if with_notes else []))
    console.print(table)
