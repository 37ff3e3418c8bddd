"""Figures of how training went: loss beside chance, schedules, speed, and accuracy beside published figures."""

from collections.abc import Iterator, Sequence
from typing import Any

import plotly.graph_objects as go

from sslkit.report.chance_level import chance_of, queue_full_at
from sslkit.report.figures import CHANCE, MAX_POINTS, Panel, Style, curve, lay_out, level, plain, values_of
from sslkit.report.run_reader import Row, RunRecord, number
from sslkit.report.series import by_series, protocols_of, series_of

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
TOP_1 = "top-1 accuracy"


def training_panels(runs: Runs) -> list[Panel]:
    """Loss, what is known of a run, and whatever else its method logged."""
    logged = {key for run in runs for row in run.metrics for key, value in row.items() if number(value) is not None}
    others = sorted(key for key in logged - NOT_CURVES if "/" not in key)
    panels = [loss_panel(runs)]
    panels += [metric_panel(runs, key, title, unit, absent) for key, (title, unit, absent) in KNOWN.items()]
    return panels + [metric_panel(runs, key, key, "", "") for key in others]


def loss_panel(runs: Runs) -> Panel:
    """Loss, its level at chance, the phase in which a queue fills, and a published trajectory."""
    style, figure = Style(len(runs)), go.Figure()
    notes: list[tuple[str, str]] = []
    for index, run in enumerate(runs):
        line = style.line(index)
        figure.add_trace(curve(run, run.metrics, "loss", name=style.name(run, "loss"), line=line))
        span = [0.0, float(run.metrics[-1]["epoch"])]
        known = chance_of(run.recipe, run.num_images)
        if known is not None:
            colour = line["color"] if len(runs) > 1 else CHANCE
            figure.add_trace(
                level(span, known[0], style.name(run, f"chance, {known[0]:.4g}"), color=colour, dash="dot")
            )
            notes.append((run.name, f"chance is {known[0]:.4g}, about {known[1]}."))
        else:
            notes.append((run.name, f"the level at chance of {run.recipe.method_name} is not known."))
        published = run.recipe.reference.get("loss_by_epoch")
        figure.add_traces(list(_trajectory(published, style.name(run, "published loss by epoch"))))
        notes += [(run.name, sentence) for sentence in _mark_queue(figure, run, str(line["color"]))]
    note = _tell(notes, len(runs))
    if len({sentence for _, sentence in notes if sentence.startswith("chance")}) > 1:
        note += " Losses with different levels at chance cannot be compared."
    if any(len(run.metrics) > MAX_POINTS for run in runs):
        note += " Of each stretch of steps the lowest and the highest value are drawn."
    return Panel("Loss", note, lay_out(figure, y="loss", height=360), wide=True)


def _mark_queue(figure: go.Figure, run: RunRecord, colour: str) -> list[str]:
    steps = queue_full_at(run.recipe)
    if not steps:
        return []
    end = steps / run.steps_per_epoch
    # A queue that never fills must not stretch the axis.
    shown = min(end, float(run.metrics[-1]["epoch"]))
    figure.add_vrect(x0=0, x1=shown, fillcolor=colour, opacity=0.14, line_width=0, layer="below")
    return [
        f"until step {steps}, epoch {end:.3g} (shaded), the queue still holds some of the random keys it starts with; "
        "a loss that rises meanwhile is no fault."
    ]


def _tell(notes: list[tuple[str, str]], num_runs: int) -> str:
    """Sentences as one note; each once, after the names of the runs it holds for if there are several."""
    names: dict[str, list[str]] = {}
    for name, sentence in notes:
        names.setdefault(sentence, []).append(name)
    if num_runs == 1:
        return " ".join(sentence[0].upper() + sentence[1:] for sentence in names)
    return " ".join(f"{', '.join(of)}: {sentence}" for sentence, of in names.items())


def metric_panel(runs: Runs, key: str, title: str, unit: str, absent: str) -> Panel:
    """One metric of all runs that logged it."""
    style, figure = Style(len(runs)), go.Figure()
    for index, run in enumerate(runs):
        if values_of(run.metrics, key):
            figure.add_trace(curve(run, run.metrics, key, name=run.name, line=style.line(index)))
    if not figure.data:
        return Panel(title, absent=absent)
    return Panel(title, "", lay_out(figure, y=unit, showlegend=len(runs) > 1, yaxis=_around_constant(figure)))


def _around_constant(figure: go.Figure) -> dict[str, Any]:
    """A range of a tenth around curves that never move, for which plotly would take one from nought to double."""
    seen = {value for trace in figure.data for value in trace.y}
    if len(seen) > 1:
        return {}
    constant = seen.pop()
    reach = abs(constant) / 20 or 1.0
    return {"range": [constant - reach, constant + reach]}


def accuracy_panel(runs: Runs) -> Panel:
    """kNN and linear accuracy over epochs with their intervals, and published figures.

    A curve joins scores of one protocol on the same data only.
    """
    style, figure = Style(len(runs)), go.Figure()
    sources: list[tuple[str, str]] = []
    for index, run in enumerate(runs):
        scored = [row for row in values_of(run.results, "accuracy") if row.get("measure", TOP_1) == TOP_1]
        for place, (name, rows) in enumerate(by_series(scored).items()):
            figure.add_trace(_scores(run, rows, style.name(run, name), style.line(index, place)))
        reference = run.recipe.reference
        figure.add_traces(list(_trajectory(reference.get("knn_by_epoch"), style.name(run, "published kNN by epoch"))))
        span = [0.0, float(run.metrics[-1]["epoch"])]
        for key, protocol, dash in (("knn_top1", "kNN", "dot"), ("linear_top1", "linear", "dash")):
            published = number(reference.get(key))
            if published is not None:
                name = style.name(run, f"published {protocol}, {published:g}")
                figure.add_trace(level(span, published, name, color=CHANCE, dash=dash))
        if reference.get("source") and figure.data:
            sources.append((run.name, f"published: {reference['source']}, on that source's own data."))
    if not any(run.results for run in runs):
        how = "Nothing was scored: set [monitor] every_epochs and data, or run `sslkit eval knn RUN --data DIR`."
        return Panel("Accuracy on labels", absent=how)
    end = max(float(run.metrics[-1]["epoch"]) for run in runs)
    layout: dict[str, Any] = {"showlegend": True, "xaxis": {"range": [0, 1.03 * end]}}
    return Panel(
        "Accuracy on labels", _tell(sources, len(runs)), lay_out(figure, y="top-1 (%)", height=360, **layout), wide=True
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


def _trajectory(published: Any, name: str) -> Iterator[go.Scatter]:
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
    """Every score of every run as table rows, its baselines beside it.

    Of the monitor's, only the last, and not that if `sslkit eval` scored the same protocol on the same data again.
    """
    rows = []
    for run in runs:
        scored = values_of(run.results, "accuracy")
        last = next((row for row in reversed(scored) if row.get("by") == "monitor"), None)
        again = {(series_of(row), str(row.get("step"))) for row in scored if row.get("by") != "monitor"}
        protocols = protocols_of(scored)
        for row in scored:
            repeated = (series_of(row), str(row.get("step"))) in again
            if row.get("by") == "monitor" and (row is not last or repeated):
                continue
            ends = _interval(row)
            rows.append(
                {
                    "run": run.name,
                    "evaluation": protocols[series_of(row)],
                    "data": str(row.get("data", "")),
                    "accuracy": f"{row['accuracy']:.2%}",
                    "interval": _in_words(ends),
                    "beside": ", ".join(_baselines(row)),
                }
            )
    return rows


def _baselines(row: Row) -> Iterator[str]:
    scores = row.get("scores")
    for score in values_of(scores[1:], "accuracy") if isinstance(scores, list) else []:
        ends = _in_words(_interval(score))
        yield f"{score.get('encoder', '')} {score['accuracy']:.2%}" + (f" ({ends})" if ends else "")


def _in_words(ends: tuple[float, float] | None) -> str:
    return f"{ends[0]:.2%} to {ends[1]:.2%}" if ends else ""
