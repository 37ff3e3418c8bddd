"""Accuracy over epochs, next to published results, and the table of all scores. A curve has one protocol and data."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from sslkit.files.jsonl_reader import Row, number
from sslkit.report.figures import (
    GREY,
    PALETTE,
    Panel,
    Style,
    escape_html,
    horizontal_line,
    join_notes,
    published_curve,
    to_json,
    values_of,
)
from sslkit.report.run_record import RunRecord
from sslkit.report.standing import HOW_TO_COMPARE, Series, baselines_of, compared_row, series_of

TOP_1 = "top-1 accuracy"


def accuracy_panel(runs: Sequence[RunRecord]) -> Panel:
    """Top-1 accuracy of each protocol over epochs, with intervals, baselines and published results."""
    if not any(run.results for run in runs):
        how = "No scores yet: set [monitor] every_epochs and data, or run `sslkit eval knn RUN --data DIR`."
        return Panel("Accuracy on labels", absent=how)
    style, figure = Style(len(runs)), go.Figure()
    sources: list[tuple[str, str]] = []
    for index, run in enumerate(runs):
        scored = [row for row in values_of(run.results, "accuracy") if row.get("measure", TOP_1) == TOP_1]
        for curve_index, (series, name) in enumerate(_series_names(scored, with_data=True).items()):
            rows = [row for row in scored if series_of(row) == series]
            figure.add_trace(_score_curve(run, rows, style.name(run, name), style.line(index, curve_index)))
        baselines, notes = _baseline_lines(run, scored, style)
        figure.add_traces(baselines)
        sources += notes
        reference = run.recipe.reference
        figure.add_traces(published_curve(reference.get("knn_by_epoch"), style.name(run, "published kNN by epoch")))
        for key, protocol, dash in (("knn_top1", "kNN", "dot"), ("linear_top1", "linear", "dash")):
            if (published := number(reference.get(key))) is not None:
                name = style.name(run, f"published {protocol}, {published:g}")
                figure.add_trace(horizontal_line(run, published, name, color=GREY, dash=dash))
        if reference.get("source") and figure.data:
            sources.append((run.name, f"published: {reference['source']}, on the data of that source."))
    end = max(run.last_epoch for run in runs)
    layout: dict[str, Any] = {"showlegend": True, "xaxis": {"range": [0, 1.03 * end]}}
    figure_json = to_json(figure, y="top-1 (%)", height=360, **layout)
    return Panel("Accuracy on labels", join_notes(sources, len(runs)), figure_json, wide=True)


def _baseline_lines(
    run: RunRecord, scored: Sequence[Row], style: Style
) -> tuple[list[go.Scatter], list[tuple[str, str]]]:
    """Lines of random init, raw pixels and other baselines of kNN; and a note by the run, if they were not measured."""
    row = compared_row(scored)
    if row is None:
        return [], [
            (run.name, f"random init and raw pixels are not drawn, because they were not measured. {HOW_TO_COMPARE}")
        ]
    lines = []
    for index, baseline in enumerate(baselines_of(row)):
        percent = 100 * baseline["accuracy"]
        name = style.name(run, f"{baseline.get('encoder', 'baseline')}, {percent:.1f}")
        lines.append(horizontal_line(run, percent, name, color=PALETTE[-1 - index % len(PALETTE)], dash="longdash"))
    return lines, [(run.name, f"lines: {row.get('evaluation', 'accuracy')} of the baselines, on the same images.")]


def _score_curve(run: RunRecord, rows: list[Row], name: str, line: dict[str, Any]) -> go.Scatter:
    """Scores of one protocol in percent, with error bars where a row has an interval."""
    accuracies = [row["accuracy"] for row in rows]
    ends = [_interval(row) or (row["accuracy"], row["accuracy"]) for row in rows]
    above = [100 * (high - value) for value, (_, high) in zip(accuracies, ends, strict=True)]
    below = [100 * (value - low) for value, (low, _) in zip(accuracies, ends, strict=True)]
    bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return go.Scatter(
        x=[run.epoch_of(row) for row in rows],
        y=[100 * value for value in accuracies],
        customdata=[escape_html(str(row.get("data", ""))) for row in rows],
        hovertemplate="%{y:.2f} % (epoch %{x:.3g})<br>%{customdata}",
        mode="lines+markers",
        name=name,
        line=line,
        error_y=bars if any(map(_interval, rows)) else None,
    )


def score_rows(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    """Every score of every run as a row of a table, with its baselines.

    Of the monitor's scores only the last, and not if `sslkit eval` has repeated it at the same step.
    """
    table = []
    for run in runs:
        scored = values_of(run.results, "accuracy")
        last = next((row for row in reversed(scored) if row.get("by") == "monitor"), None)
        evaluated = {(series_of(row), row.get("step")) for row in scored if row.get("by") != "monitor"}
        names = _series_names(scored, with_data=False)
        for row in scored:
            is_repeated = (series_of(row), row.get("step")) in evaluated
            if row.get("by") == "monitor" and (row is not last or is_repeated):
                continue
            baselines = baselines_of(row)
            cells = {
                "run": run.name,
                "evaluation": names[series_of(row)],
                "data": str(row.get("data", "")),
                "accuracy": f"{row['accuracy']:.2%}",
                "interval": _format_interval(row),
                "baselines": ", ".join(map(_format_baseline, baselines)),
            }
            table.append(cells)
    return table


def _format_baseline(score: Row) -> str:
    interval = _format_interval(score)
    return f"{score.get('encoder', '')} {score['accuracy']:.2%}" + (f" ({interval})" if interval else "")


def _interval(row: Row) -> tuple[float, float] | None:
    ends = row.get("interval")
    if isinstance(ends, list) and len(ends) == 2 and all(number(end) is not None for end in ends):
        return float(ends[0]), float(ends[1])
    return None


def _format_interval(row: Row) -> str:
    ends = _interval(row)
    return f"{ends[0]:.2%} to {ends[1]:.2%}" if ends else ""


def _series_names(rows: Sequence[Row], with_data: bool) -> dict[Series, str]:
    """A unique name for each series: the evaluation, its data if they differ, and the hash where that is ambiguous.

    The data is left out unless ``with_data``: a table has a column for it.
    """
    found = dict.fromkeys(map(series_of, rows))
    counts = Counter(series[:2] for series in found)
    several = with_data and len({data for _, data, _ in found}) > 1
    names = {}
    for evaluation, data, digest in found:
        name = f"{evaluation}, {data}" if several and data else evaluation
        ambiguous = counts[evaluation, data] > 1
        names[evaluation, data, digest] = f"{name} [{digest or 'no protocol recorded'}]" if ambiguous else name
    return names
