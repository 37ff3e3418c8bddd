"""Figures of how training went: loss beside chance, schedules, speed, and accuracy beside published figures."""

from collections.abc import Iterator, Sequence
from typing import Any

import plotly.graph_objects as go

from sslkit.report.chance import chance_of, queue_full_at
from sslkit.report.figures import CHANCE, MAX_POINTS, Panel, Style, curve, lay_out, level, plain, values_of
from sslkit.report.runs import Row, RunRecord, number

Runs = Sequence[RunRecord]

# Metrics in the page's order, with title, axis, and what to say if no run has logged them.
KNOWN = {
    "accuracy": ("Pretext accuracy", "share", "This method has no pretext accuracy to log."),
    "lr": ("Learning rate", "", "Not logged by this version of sslkit."),
    "momentum": ("Momentum of the teacher", "", "This method has no momentum teacher."),
    "grad_norm": ("Gradient norm", "before clipping", "Not logged by this version of sslkit."),
    "images_per_second": ("Images per second", "", "Not logged by this version of sslkit."),
    "data_wait": ("Share of time waiting for data", "share", "Not logged by this version of sslkit."),
}
NOT_CURVES = {"step", "epoch", "loss", *KNOWN}


def training_panels(runs: Runs) -> list[Panel]:
    """Loss, what is known of a run, and whatever else its method logged."""
    others = sorted({key for run in runs for key in run.metrics[-1] if key not in NOT_CURVES and "/" not in key})
    panels = [loss_panel(runs)]
    panels += [metric_panel(runs, key, title, unit, absent) for key, (title, unit, absent) in KNOWN.items()]
    return panels + [metric_panel(runs, key, key, "", "") for key in others]


def loss_panel(runs: Runs) -> Panel:
    """Loss, its level at chance, the phase in which a queue fills, and a published trajectory."""
    style, figure, notes = Style(len(runs)), go.Figure(), []
    for index, run in enumerate(runs):
        line = style.line(index)
        figure.add_trace(curve(run, run.metrics, "loss", name=style.name(run, "loss"), line=line))
        span = [0.0, float(run.metrics[-1]["epoch"])]
        known = chance_of(run.recipe, run.num_images)
        if known is not None:
            colour = line["color"] if len(runs) > 1 else CHANCE
            figure.add_trace(level(span, known[0], style.name(run, f"chance, {known[0]:.4g}"), color=colour))
            notes.append(f"{run.name}: chance is {known[0]:.4g} = {known[1]}.")
        else:
            notes.append(f"{run.name}: the level at chance of {run.recipe.method_name} is not known.")
        published = run.recipe.reference.get("loss_by_epoch")
        figure.add_traces(list(_trajectory(published, style.name(run, "published"), index)))
        _mark_queue(figure, run, str(line["color"]), notes)
    thinned = any(len(run.metrics) > MAX_POINTS for run in runs)
    notes += ["Of each stretch of steps the lowest and the highest value are drawn."] if thinned else []
    return Panel("Loss", " ".join(notes), lay_out(figure, y="loss", height=360), wide=True)


def _mark_queue(figure: go.Figure, run: RunRecord, colour: str, notes: list[str]) -> None:
    steps = queue_full_at(run.recipe)
    if not steps:
        return
    end = steps / run.steps_per_epoch
    # A queue that never fills must not stretch the axis.
    shown = min(end, float(run.metrics[-1]["epoch"]))
    figure.add_vrect(x0=0, x1=shown, fillcolor=colour, opacity=0.14, line_width=0, layer="below")
    notes.append(
        f"{run.name}: until step {steps}, epoch {end:.3g} (shaded), the queue still holds some of the random keys it "
        "starts with; a loss that rises meanwhile is no fault."
    )


def metric_panel(runs: Runs, key: str, title: str, unit: str, absent: str) -> Panel:
    """One metric of all runs that logged it."""
    style, figure = Style(len(runs)), go.Figure()
    for index, run in enumerate(runs):
        if values_of(run.metrics, key):
            figure.add_trace(curve(run, run.metrics, key, name=style.name(run, key), line=style.line(index)))
    if not figure.data:
        return Panel(plain(title), absent=absent)
    return Panel(title, "", lay_out(figure, y=unit, showlegend=len(runs) > 1))


def accuracy_panel(runs: Runs) -> Panel:
    """kNN and linear accuracy over epochs with their intervals, baselines, and published figures."""
    style, figure = Style(len(runs)), go.Figure()
    sources = []
    for index, run in enumerate(runs):
        names = dict.fromkeys(str(row.get("evaluation", "accuracy")) for row in values_of(run.results, "accuracy"))
        for place, name in enumerate(names):
            rows = [row for row in values_of(run.results, "accuracy") if str(row.get("evaluation", "accuracy")) == name]
            figure.add_trace(_scores(run, rows, style.name(run, name), style.line(index, place)))
        reference = run.recipe.reference
        figure.add_traces(list(_trajectory(reference.get("knn_by_epoch"), style.name(run, "published kNN"), index)))
        span = [0.0, float(run.metrics[-1]["epoch"])]
        for key, protocol in (("knn_top1", "kNN"), ("linear_top1", "linear")):
            published = number(reference.get(key))
            if published is not None:
                figure.add_trace(level(span, published, style.name(run, f"published {protocol}"), color=CHANCE))
        if reference.get("source") and figure.data:
            sources.append(f"{run.name}: published figures are from {reference['source']}, on that source's own data.")
    if not any(run.results for run in runs):
        how = "Nothing was scored: set [monitor] every_epochs and data, or run `sslkit eval knn RUN --data DIR`."
        return Panel("Accuracy on labels", absent=how)
    return Panel(
        "Accuracy on labels", " ".join(dict.fromkeys(sources)), lay_out(figure, y="top-1 (%)", height=360), wide=True
    )


def _scores(run: RunRecord, rows: list[Row], name: str, line: dict[str, Any]) -> go.Scatter:
    """Scores of one protocol in percent; where a row has an interval, as a bar."""
    intervals = [_interval(row) for row in rows]
    bars = None
    if any(intervals):
        bars = {
            "type": "data",
            "symmetric": False,
            "array": [
                100 * (ends[1] - row["accuracy"]) if ends else 0.0 for row, ends in zip(rows, intervals, strict=True)
            ],
            "arrayminus": [
                100 * (row["accuracy"] - ends[0]) if ends else 0.0 for row, ends in zip(rows, intervals, strict=True)
            ],
        }
    return go.Scatter(
        x=[run.epoch_of(row) for row in rows],
        y=[100 * row["accuracy"] for row in rows],
        customdata=[plain(str(row.get("data", ""))) for row in rows],
        hovertemplate="%{y:.2f} % (epoch %{x:.3g})<br>%{customdata}",
        mode="lines+markers",
        name=name,
        line=line,
        error_y=bars,
    )


def _interval(row: Row) -> tuple[float, float] | None:
    ends = row.get("interval")
    if isinstance(ends, list) and len(ends) == 2 and all(number(end) is not None for end in ends):
        return float(ends[0]), float(ends[1])
    return None


def _trajectory(published: Any, name: str, run: int) -> Iterator[go.Scatter]:
    """A recipe's ``[reference.*_by_epoch]`` table, in the published unit."""
    if not isinstance(published, dict):
        return
    numbered = {
        epoch: value for epoch, value in published.items() if str(epoch).isdecimal() and number(value) is not None
    }
    points = sorted((int(epoch), value) for epoch, value in numbered.items())
    yield go.Scatter(
        x=[epoch for epoch, _ in points],
        y=[value for _, value in points],
        mode="lines+markers",
        name=name,
        line={"dash": "dot", "color": CHANCE, "width": 1.5},
        marker={"symbol": "diamond-open", "size": 7},
        hovertemplate="published: %{y:.4g} (epoch %{x:g})",
    )


def score_rows(runs: Runs) -> list[dict[str, str]]:
    """Every score of every run as table rows, baselines with it; the monitor's earlier ones are left to the figure."""
    rows = []
    for run in runs:
        scored = values_of(run.results, "accuracy")
        last = next((row for row in reversed(scored) if row.get("by") == "monitor"), None)
        for row in scored:
            if row.get("by") == "monitor" and row is not last:
                continue
            listed = row.get("scores") or [{"encoder": run.name, **row}]
            for place, score in enumerate(values_of(listed, "accuracy")):
                ends = _interval(score) or (_interval(row) if place == 0 else None)
                rows.append(
                    {
                        "run": run.name,
                        "evaluation": str(row.get("evaluation", "")),
                        "data": str(row.get("data", "")),
                        "encoder": run.name if place == 0 else str(score.get("encoder", "")),
                        "accuracy": f"{score['accuracy']:.2%}",
                        "interval": f"{ends[0]:.2%} to {ends[1]:.2%}" if ends else "",
                    }
                )
    return rows
