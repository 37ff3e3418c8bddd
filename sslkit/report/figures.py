"""What all figures share: panels, colours for light and dark ground, and fewer points where there are many."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from sslkit.errors import without_tokens
from sslkit.report.run_reader import Row, RunRecord, number

# Okabe and Ito's colours, told apart by colour-blind eyes; black is left out, it would vanish on dark ground.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7f00", "#7f7f7f")
DASHES = ("solid", "dash", "dot", "dashdot")
CHANCE = "#7f7f7f"
MAX_POINTS = 2000
HEIGHT = 300


@dataclass(frozen=True)
class Panel:
    """One figure of a page, or the line that stands in its place.

    Attributes:
        title: Its heading.
        note: A sentence under the heading; may be empty.
        figure: Plotly's JSON, or empty where there is nothing to draw.
        absent: What is said then: why, and how to get it.
        wide: Whether it takes the whole width.
    """

    title: str
    note: str = ""
    figure: str = ""
    absent: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Style:
    """How curves of several runs are told apart: a run has a colour, its second and third curves have dashes.

    Attributes:
        num_runs: Runs on the page. A single run's curves have a colour each.
    """

    num_runs: int

    def line(self, run: int, curve: int = 0) -> dict[str, str | float]:
        """Plotly's line of a run's curve."""
        colour = PALETTE[(run if self.num_runs > 1 else curve) % len(PALETTE)]
        dash = DASHES[curve % len(DASHES)] if self.num_runs > 1 else "solid"
        return {"color": colour, "dash": dash, "width": 1.8}

    def name(self, run: RunRecord, curve: str) -> str:
        """What the legend, or a note, calls it: with the run's name if there are several."""
        return f"{run.name}: {curve}" if self.num_runs > 1 else curve


def plain(text: str) -> str:
    """Text as plotly must be given it, which takes some HTML tags for mark-up."""
    return html.escape(text, quote=False)


def values_of(rows: Sequence[Row], key: str) -> list[Row]:
    """The rows that have a finite number under ``key``."""
    return [row for row in rows if number(row.get(key)) is not None]


def thin(values: Sequence[float], at_most: int = MAX_POINTS) -> NDArray[np.int64]:
    """Positions of at most so many values: the lowest and the highest of each of equal stretches, so that no peak goes.

    All of them where there are few.
    """
    if len(values) <= at_most:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), max(at_most // 2, 1))
    taken = np.asarray(values)
    ends = [(part[taken[part].argmin()], part[taken[part].argmax()]) for part in stretches]
    return np.unique(np.asarray(ends, dtype=np.int64))


def curve(run: RunRecord, rows: Sequence[Row], key: str, *, scale: float = 1.0, **trace: object) -> go.Scatter:
    """A line through the rows' values of ``key`` over epochs, thinned."""
    rows = values_of(rows, key)
    rows = [rows[index] for index in thin([row[key] for row in rows])]
    return go.Scatter(
        x=[run.epoch_of(row) for row in rows],
        y=[scale * row[key] for row in rows],
        customdata=[row.get("step") for row in rows],
        hovertemplate="%{y:.5g} (epoch %{x:.3g}, step %{customdata})",
        mode="lines" if len(rows) > 1 else "markers",
        **trace,
    )


def level(x: Sequence[float], y: float, name: str, **line: object) -> go.Scatter:
    """A horizontal line, as a curve so that the legend names it."""
    return go.Scatter(
        x=[x[0], x[-1]],
        y=[y, y],
        mode="lines",
        name=name,
        line={"width": 1.5, **line},
        hovertemplate="%{y:.4g}",
    )


def lay_out(figure: go.Figure, *, y: str = "", x: str = "epoch", height: int = HEIGHT, **layout: object) -> str:
    """Give a figure the page's layout and return its JSON. Ink and grid get their colours in the browser, by theme."""
    for trace in figure.data:
        trace.name = None if trace.name is None else plain(trace.name)
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
    # "</script>" inside a name must not end the script element that holds the figure.
    text = without_tokens(str(figure.to_json()))  # names of runs, classes and files are words from outside
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
