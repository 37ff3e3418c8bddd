"""Shared by all figures of a report: panels, colours, curves and layout in plotly, and thinning of long logs."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from sslkit.errors import without_tokens
from sslkit.files.jsonl_reader import Row, number
from sslkit.report.run_record import RunRecord

# The palette of Okabe and Ito, suitable for colour-blind readers; without black, which vanishes on a dark background.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7f00", "#7f7f7f")
DASHES = ("solid", "dash", "dot", "dashdot")
GREY = "#7f7f7f"
MAX_POINTS = 2000
HEIGHT = 300


@dataclass(frozen=True)
class Panel:
    """A figure of a report with a heading and a note below it, or ``absent``: why there is none, and how to get it."""

    title: str
    note: str = ""
    figure: str = ""  # plotly's JSON
    absent: str = ""
    wide: bool = False  # as wide as the page


@dataclass(frozen=True)
class Style:
    """How curves differ: a colour per run and a dash pattern per curve; the curves of a single run differ in colour."""

    num_runs: int

    def line(self, run: int, curve: int = 0) -> dict[str, str | float]:
        """Plotly's line style of a curve."""
        colour = PALETTE[(run if self.num_runs > 1 else curve) % len(PALETTE)]
        dash = DASHES[curve % len(DASHES)] if self.num_runs > 1 else "solid"
        return {"color": colour, "dash": dash, "width": 1.8}

    def name(self, run: RunRecord, curve: str) -> str:
        """Name of a curve in the legend; starts with the name of the run if there are several."""
        return f"{run.name}: {curve}" if self.num_runs > 1 else curve


def escape_html(text: str) -> str:
    """Escape text for plotly, which interprets some HTML tags."""
    return html.escape(text, quote=False)


def values_of(rows: Sequence[Row], key: str) -> list[Row]:
    """The rows with a finite number under ``key``."""
    return [row for row in rows if number(row.get(key)) is not None]


def thin(values: Sequence[float], max_points: int = MAX_POINTS) -> NDArray[np.int64]:
    """Indices of at most ``max_points`` values: the lowest and the highest of equal intervals, so that peaks stay."""
    if len(values) <= max_points:
        return np.arange(len(values))
    intervals = np.array_split(np.arange(len(values)), max(max_points // 2, 1))
    array = np.asarray(values)
    extremes = [(part[array[part].argmin()], part[array[part].argmax()]) for part in intervals]
    return np.unique(np.asarray(extremes, dtype=np.int64))


def curve(run: RunRecord, rows: Sequence[Row], key: str, **trace: object) -> go.Scatter:
    """The values of ``key`` over epochs, thinned."""
    rows = values_of(rows, key)
    rows = [rows[index] for index in thin([row[key] for row in rows])]
    return go.Scatter(
        x=[run.epoch_of(row) for row in rows],
        y=[row[key] for row in rows],
        customdata=[row.get("step") for row in rows],
        hovertemplate="%{y:.5g} (epoch %{x:.3g}, step %{customdata})",
        mode="lines" if len(rows) > 1 else "markers",
        **trace,
    )


def metric_panel(runs: Sequence[RunRecord], log: str, key: str, panel: Panel, unit: str = "") -> Panel:
    """The panel with the curves of ``key`` in ``metrics`` or ``diagnostics``; as it is if no run logged this."""
    style, figure = Style(len(runs)), go.Figure()
    for index, run in enumerate(runs):
        if values_of(rows := getattr(run, log), key):
            figure.add_trace(curve(run, rows, key, name=run.name, line=style.line(index)))
    if not figure.data:
        return panel
    axis: dict[str, Any] = {}
    values = {value for trace in figure.data for value in trace.y}
    if len(values) == 1:  # plotly would show zero to twice the value
        constant = values.pop()
        margin = abs(constant) / 20 or 1.0
        axis = {"range": [constant - margin, constant + margin]}
    return replace(panel, figure=to_json(figure, y=unit, showlegend=len(runs) > 1, yaxis=axis))


def horizontal_line(run: RunRecord, y: float, name: str, **line: object) -> go.Scatter:
    """A horizontal line over all epochs of the run, as a curve, so that the legend shows it."""
    return go.Scatter(
        x=[0.0, run.last_epoch],
        y=[y, y],
        mode="lines",
        name=name,
        line={"width": 1.5, **line},
        hovertemplate="%{y:.4g}",
    )


def published_curve(published: object, name: str) -> list[go.Scatter]:
    """The curve of a recipe's ``[reference.*_by_epoch]`` table, in the published unit; none if it is not a table."""
    if not isinstance(published, dict):
        return []
    valid = {int(key): y for key, y in published.items() if str(key).isdecimal() and number(y) is not None}
    epochs = sorted(valid)
    return [
        go.Scatter(
            x=epochs,
            y=[valid[epoch] for epoch in epochs],
            mode="lines+markers",
            name=name,
            line={"dash": "dot", "color": GREY, "width": 1.5},
            marker={"symbol": "diamond-open", "size": 7},
            hovertemplate="published: %{y:.4g} (epoch %{x:g})",
        )
    ]


def join_notes(notes: list[tuple[str, str]], num_runs: int) -> str:
    """Join (run, sentence) pairs into one text, each sentence once, with the names of its runs if there are several."""
    names: dict[str, list[str]] = {}
    for name, sentence in notes:
        names.setdefault(sentence, []).append(name)
    if num_runs == 1:
        return " ".join(sentence[0].upper() + sentence[1:] for sentence in names)
    return " ".join(f"{', '.join(runs)}: {sentence}" for sentence, runs in names.items())


def to_json(figure: go.Figure, *, y: str = "", x: str = "epoch", height: int = HEIGHT, **layout: object) -> str:
    """Apply the layout of the page and return the figure as JSON. The browser sets the colours of text and grid."""
    for trace in figure.data:
        trace.name = None if trace.name is None else escape_html(trace.name)
    figure.update_layout(
        template=None,
        height=height,
        margin={"l": 64, "r": 12, "t": 12, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 12},
        legend={"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0, "xanchor": "left"},
        hovermode="closest",
        xaxis={"title": {"text": x, "standoff": 6}, "zeroline": False, "rangemode": "tozero"},
        yaxis={"title": {"text": y, "standoff": 6}, "zeroline": False},
    )
    figure.update_layout(**layout)
    text = without_tokens(str(figure.to_json()))  # names of runs, classes and files may contain anything
    # "</script>" in a name must not end the script element that holds the figure.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
