"""Print results of commands, as tables or as JSON, and the messages of `sslkit.data`."""

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sslkit.errors import UserError, without_tokens
from sslkit.terminal import PlainTable, print_json, print_line, print_plain

if TYPE_CHECKING:
    from sslkit.evaluate.evaluation_result import EvaluationResult, Score
    from sslkit.evaluate.label_free.diagnose import Diagnosis

console = Console()

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def print_and_store(model: str, results: "Sequence[EvaluationResult]", as_json: bool) -> None:
    """Print evaluations; if the model is a run, add them to its results.jsonl, after printing: the disk may be full."""
    if as_json:
        properties = ("protocol_hash", "verdict")
        fields = [dataclasses.asdict(each) | {name: getattr(each, name) for name in properties} for each in results]
        print_json(fields[0] if len(fields) == 1 else fields)
    else:
        for result in results:
            _print_result(result)
    if (Path(model) / "recipe.toml").is_file() and (Path(model) / "encoder").is_dir():
        for result in results:
            _store(Path(model), result)


def _store(run: Path, result: "EvaluationResult") -> None:
    from sslkit.engine.logging.logger import append_result
    from sslkit.files.run_reader import RunReader

    step = RunReader(run).latest_step()
    if step is None:
        raise UserError(f"{run / 'checkpoints/latest'}: does not name a checkpoint; the score was not added to the run")
    own = result.scores[0]
    row = {"step": step, "by": "eval", "evaluation": result.evaluation, "data": result.data}
    row |= {"accuracy": own.accuracy, "measure": result.measure, "interval": own.interval}
    row |= {"protocol_hash": result.protocol_hash, "protocol": result.protocol}
    row |= {"scores": [dataclasses.asdict(score) for score in result.scores], "verdict": result.verdict}
    append_result(run, json.loads(without_tokens(json.dumps(row))))  # reports and model cards show it


def _print_result(result: "EvaluationResult") -> None:
    print_line(f"{result.evaluation}, {result.data}")
    scores = result.scores
    console.print(_table_of_measures(scores) if scores[0].measures else _table_of_scores(scores, result.measure))
    if result.grid:
        grid = PlainTable(*result.grid[0], title="all heads, the best on held-out images first")
        for head in result.grid:
            grid.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in head.values()))
        console.print(grid)
    if result.verdict:
        print_line(result.verdict)


def _table_of_scores(scores: "Sequence[Score]", measure: str) -> Table:
    """One row per encoder."""
    with_intervals, with_notes = any(score.interval for score in scores), any(score.note for score in scores)
    table = PlainTable("encoder", measure)
    for heading in ["95 % interval"] * with_intervals + ["note"] * with_notes:
        table.add_column(heading)
    for score in scores:
        cells = [f"{score.accuracy:.2%}"] + [_format_interval(score.interval)] * with_intervals
        table.add_row(score.encoder, *cells, *([score.note] if with_notes else []))
    return table


def _table_of_measures(scores: "Sequence[Score]") -> Table:
    """One row per measure: six measures with intervals would not fit in columns."""
    table = PlainTable("measure (95 % interval)")
    for score in scores:
        table.add_column(score.encoder, overflow="fold")
    for name in scores[0].measures:
        values = [f"{each.measures[name]:.2%} ({_format_interval(each.intervals[name])})" for each in scores]
        table.add_row(name, *values)
    return table


def print_comparison(groups: list[dict[str, dict[str, Any]]], as_json: bool) -> None:
    """Print one table per protocol, the best score first, and a sentence on how far the others are."""
    from sslkit.evaluate.compare_scores import best_sentence

    if as_json:
        print_json(groups)
        return
    for group in groups:
        first = next(iter(group.values()))
        print_line(f"{first['evaluation']}, protocol {first['protocol_hash']}")
        table = PlainTable("model", first.get("measure", "top-1 accuracy"), "95 % interval")
        for model, row in sorted(group.items(), key=lambda item: -item[1]["accuracy"]):
            table.add_row(model, f"{row['accuracy']:.2%}", _format_interval(row.get("interval")))
        console.print(table)
        if sentence := best_sentence(group):
            print_line(sentence)
    print_line("To compare image by image, with narrower intervals: sslkit eval knn MODEL --data DATA --baseline OTHER")


def _format_interval(interval: "Sequence[float] | None") -> str:
    return "{:.1%} to {:.1%}".format(*interval) if interval else "not computed"


def print_diagnosis(diagnosis: "Diagnosis", as_json: bool) -> None:
    """Print label-free measures, one column per encoder, and alarms about the first encoder."""
    from sslkit.engine.monitor.alarms import collapse_alarm

    own = diagnosis.encoders[0]
    alarms = collapse_alarm(own.numbers.embedding_std, own.numbers.effective_rank, own.dim)
    if as_json:
        fields = dataclasses.asdict(diagnosis)
        print_json({**fields, "contestants": fields["encoders"], "alarms": alarms})  # scripts read the former key
        return
    interpretations = {
        "embedding_std": f"0: collapsed, {own.dim**-0.5:.3g}: uniform",
        "effective_rank": f"1 to {min(2 * diagnosis.images, own.dim)} directions",
        "alpha_req": "decay of the spectrum, best near 1",
        "lidar": f"1 to {min(diagnosis.images - 1, own.dim)} directions",
        "alignment": "0: equal views, 2: unrelated",
        "uniformity": "0: collapsed, -4: uniform",
        "pretext_top1": "images found by another view",
    }
    print_line(f"{diagnosis.images} images of {diagnosis.data}, {diagnosis.views} views each")
    table = PlainTable("", *(each.encoder for each in diagnosis.encoders), "interpretation")
    for name, interpretation in interpretations.items():
        values = [getattr(each.numbers, name) for each in diagnosis.encoders]
        table.add_row(name, *("-" if value is None else f"{value:.4g}" for value in values), interpretation)
    console.print(table)
    for alarm in alarms:
        print_line(alarm, "bold red")
    if not alarms:
        print_line(diagnosis.verdict)


class _PrintHandler(logging.Handler):
    """Prints each message once; with several processes, in the first process only."""

    def __init__(self, *, to_stderr: bool) -> None:
        super().__init__(logging.INFO)
        self.to_stderr, self.printed = to_stderr, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message in self.printed or os.environ.get("RANK", "0") != "0":
            return
        self.printed.add(message)
        with suppress(OSError):
            print_plain(message, to_stderr=self.to_stderr)


@contextmanager
def print_data_messages(*, to_stderr: bool) -> Iterator[None]:
    """Print what `sslkit.data` logs, such as which images, split and columns it reads."""
    logger = logging.getLogger("sslkit.data")
    handler, level, propagate = _PrintHandler(to_stderr=to_stderr), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
