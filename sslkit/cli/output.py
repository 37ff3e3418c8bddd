"""What commands print: tables, or JSON for programs."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sslkit.errors import UserError, without_tokens
from sslkit.terminal import PlainTable, show, show_json

if TYPE_CHECKING:
    from sslkit.doctor import Report
    from sslkit.evaluate.evaluation_result import EvaluationResult, Score
    from sslkit.evaluate.label_free.diagnose import Diagnosis

console = Console()

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def show_report(report: "Report", as_json: bool) -> None:
    """Print an examination: what applies as a table, the worst first; all of it, in its own order, as JSON."""
    counts = {verdict: len(report.of(verdict)) for verdict in ("fault", "warning", "ok")}
    if as_json:
        show_json({**counts, "findings": [dataclasses.asdict(finding) for finding in report.findings]})
        return
    colours = {"fault": "bold red", "warning": "yellow", "ok": "green"}
    table = PlainTable("check", "verdict", "what was seen")
    for finding in [*report.of("fault"), *report.of("warning"), *report.of("ok")]:
        table.add_row(finding.check, Text(finding.verdict, colours[finding.verdict]), finding.sentence)
    console.print(table)
    absent = [finding.check for finding in report.of("not applicable")]
    show("not applicable here: " + (", ".join(absent) or "none"))
    show(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def conclude(model: str, results: "Sequence[EvaluationResult]", as_json: bool) -> None:
    """Print results and then, if the model is a run, add them to the run's results, which a full disk may refuse."""
    if as_json:
        fields = [{**dataclasses.asdict(each), "protocol_hash": each.protocol_hash} for each in results]
        show_json(fields[0] if len(fields) == 1 else fields)
    for result in results if not as_json else ():
        _show_judgement(result)
    if (Path(model) / "recipe.toml").is_file() and (Path(model) / "encoder").is_dir():
        for result in results:
            _store(Path(model), result)


def _store(run: Path, result: "EvaluationResult") -> None:
    from sslkit.engine.logging.logger import append_result

    own = result.scores[0]
    row = {"by": "eval", "evaluation": result.evaluation, "data": result.data, "accuracy": own.accuracy}
    row |= {"measure": result.measure, "interval": own.interval, "protocol_hash": result.protocol_hash}
    latest = run / "checkpoints" / "latest"
    try:
        step = int(latest.read_text(encoding="utf-8").strip().removeprefix("step-"))
    except (OSError, ValueError) as error:
        raise UserError(f"{latest}: does not name a checkpoint, so the score cannot be added to the run") from error
    scores = [dataclasses.asdict(score) for score in result.scores]
    row = {"step": step, **row, "protocol": result.protocol, "scores": scores}
    append_result(run, json.loads(without_tokens(json.dumps(row))))  # it is shown in reports and model cards


def _show_judgement(result: "EvaluationResult") -> None:
    show(f"{result.evaluation}, {result.data}")
    scores = result.scores
    console.print(_table_of_measures(scores) if scores[0].measures else _table_of_scores(scores, result.measure))
    if result.grid:
        grid = PlainTable(*result.grid[0], title="every head, best first on the held-out images")
        for head in result.grid:
            grid.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in head.values()))
        console.print(grid)


def _table_of_scores(scores: "Sequence[Score]", measure: str) -> Table:
    """A row for each encoder."""
    with_intervals, with_notes = any(score.interval for score in scores), any(score.note for score in scores)
    table = PlainTable("encoder", measure)
    for heading in ["95 % interval"] * with_intervals + ["chosen"] * with_notes:
        table.add_column(heading)
    for score in scores:
        cells = [f"{score.accuracy:.2%}"] + [_in_words(score.interval)] * with_intervals
        table.add_row(score.encoder, *cells, *([score.note] if with_notes else []))
    return table


def _table_of_measures(scores: "Sequence[Score]") -> Table:
    """A row for each measure: six columns of them, each with its interval, are more than a terminal has room for."""
    table = PlainTable("measure (95 % interval)")
    for score in scores:
        table.add_column(score.encoder, overflow="fold")
    for name in scores[0].measures:
        table.add_row(name, *(f"{score.measures[name]:.2%} ({_in_words(score.intervals[name])})" for score in scores))
    return table


def show_comparison(groups: list[dict[str, dict[str, Any]]], as_json: bool) -> None:
    """Print a table for each protocol, best first."""
    if as_json:
        show_json(groups)
        return
    for group in groups:
        first = next(iter(group.values()))
        show(f"{first['evaluation']}, protocol {first['protocol_hash']}")
        table = PlainTable("model", first.get("measure", "top-1 accuracy"), "95 % interval")
        for model, row in sorted(group.items(), key=lambda item: -item[1]["accuracy"]):
            table.add_row(model, f"{row['accuracy']:.2%}", _in_words(row.get("interval")))
        console.print(table)


def _in_words(interval: "Sequence[float] | None") -> str:
    return "{:.1%} to {:.1%}".format(*interval) if interval else "not computed"


def show_diagnosis(diagnosis: "Diagnosis", as_json: bool) -> None:
    """Print label-free numbers, a column for each encoder, and what is alarming about the first."""
    from sslkit.engine.monitor.alarms import collapse_alarm

    own = diagnosis.encoders[0]
    alarms = collapse_alarm(own.numbers.embedding_std, own.numbers.effective_rank, own.dim)
    if as_json:
        fields = dataclasses.asdict(diagnosis)
        show_json({**fields, "contestants": fields["encoders"], "alarms": alarms})  # the former key stays
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
    show(opening)
    table = PlainTable("", *(each.encoder for each in diagnosis.encoders), "reads as")
    for name, meaning in meanings.items():
        values = [getattr(each.numbers, name) for each in diagnosis.encoders]
        table.add_row(name, *("-" if value is None else f"{value:.4g}" for value in values), meaning)
    console.print(table)
    for alarm in alarms:
        show(alarm, "bold red")
