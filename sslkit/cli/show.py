"""What commands print: tables, or JSON for programs."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from sslkit.doctor import Report
    from sslkit.evaluate.diagnose import Diagnosis
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
        latest = (Path(model) / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
        step = int(latest.removeprefix("step-"))
        append_result(Path(model), {"step": step, **row, "protocol": judgement.protocol, "scores": fields["scores"]})
    if as_json:
        print(json.dumps(fields))
        return
    console.print(f"{judgement.evaluation}, {judgement.data}", highlight=False, markup=False)
    with_notes = any(score.note for score in judgement.scores)
    table = Table("encoder", "top-1 accuracy", *(["chosen"] if with_notes else []))
    for score in judgement.scores:
        table.add_row(score.encoder, f"{score.accuracy:.2%}", *([score.note] if with_notes else []))
    console.print(table)


def show_diagnosis(diagnosis: "Diagnosis", as_json: bool) -> None:
    """Print label-free numbers, a column for each encoder, and what is alarming about the first."""
    from sslkit.engine.alarms import collapse_alarm

    own = diagnosis.contestants[0]
    alarms = collapse_alarm(own.numbers.embedding_std, own.numbers.effective_rank, own.dim)
    if as_json:
        print(json.dumps({**dataclasses.asdict(diagnosis), "alarms": alarms}))
        return
    rows = min(2 * diagnosis.images, own.dim)
    meanings = {
        "embedding_std": f"0 collapsed, {own.dim**-0.5:.3g} even",
        "effective_rank": f"1 to {rows} directions",
        "alpha_req": "decay, best near 1",
        "lidar": f"1 to {min(diagnosis.images - 1, own.dim)} directions",
        "alignment": "0 alike, 2 unrelated",
        "uniformity": "0 collapsed, -4 even",
        "pretext_top1": "found by its view",
    }
    opening = f"{diagnosis.images} images of {diagnosis.data}, {diagnosis.views} views each"
    console.print(opening, highlight=False, markup=False)
    table = Table("", *(escape(each.encoder) for each in diagnosis.contestants), "reads as")
    for name, meaning in meanings.items():
        values = [getattr(each.numbers, name) for each in diagnosis.contestants]
        table.add_row(name, *("-" if value is None else f"{value:.4g}" for value in values), meaning)
    console.print(table)
    for alarm in alarms:
        console.print(alarm, style="bold red", highlight=False, markup=False, soft_wrap=True)
