"""Figures of a run's health: gradients by layer, and what `diagnostics.jsonl` says about collapse."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from sslkit.report.figures import PALETTE, Panel, Style, curve, lay_out, plain, values_of
from sslkit.report.run_reader import Row, RunRecord, number

GRADIENT = "gradient/"
MAX_COLUMNS = 400
MAX_HISTOGRAMS = 40
ROW_HEIGHT = 22

NO_GRADIENTS = "Not logged: set [monitor] layer_gradients = true to see which layer's gradient jumps first."
NO_DIAGNOSTICS = "Not logged: set [monitor] diagnose_every, which is on unless set to 0."
# What a diagnosis may hold, with its title and how to read it.
COLLAPSE = {
    "embedding_std": ("Spread of the embeddings", "Near 0 when all images get the same embedding."),
    "effective_rank": ("Effective rank", "How many directions the embeddings use; a fall is dimensional collapse."),
    "alpha_req": (
        "Alpha-ReQ",
        "Decay of the covariance's eigenvalues; about 1 is good, far above it few directions rule.",
    ),
    "lidar": ("LiDAR", "How many directions tell images apart, views of one image aside."),
    "alignment": ("Alignment", "Distance between two views of an image; falls while the method learns."),
    "uniformity": ("Uniformity", "Lower is more evenly spread on the sphere; near 0 is collapse."),
}


@dataclass(frozen=True)
class Alarm:
    """A sentence that a run's diagnosis raised.

    Attributes:
        run: Whose.
        sentence: As it was last raised.
        first: Epoch in which the run first raised this sentence.
        last: Epoch in which it last did.
        standing: Whether the newest diagnosis of the run still raises it.
    """

    run: str
    sentence: str
    first: float
    last: float
    standing: bool


def alarms_of(run: RunRecord) -> list[Alarm]:
    """Every sentence once, those that still stand first."""
    seen: dict[str, list[int]] = {}
    for index, row in enumerate(run.diagnostics):
        raised = row.get("alarms")
        for sentence in raised if isinstance(raised, list) else []:
            seen.setdefault(str(sentence), []).append(index)
    found = [
        Alarm(
            run.name,
            sentence,
            run.epoch_of(run.diagnostics[where[0]]),
            run.epoch_of(run.diagnostics[where[-1]]),
            where[-1] == len(run.diagnostics) - 1,
        )
        for sentence, where in seen.items()
    ]
    return sorted(found, key=lambda alarm: (not alarm.standing, alarm.first))


def gradient_panel(run: RunRecord, title: str) -> Panel:
    """Layer by step: the norm of each layer's gradient on a logarithmic scale."""
    layers = list(dict.fromkeys(key for row in run.metrics for key in row if key.startswith(GRADIENT)))
    rows = [row for row in run.metrics if any(key in row for key in layers)]
    if not layers:
        return Panel(title, absent=NO_GRADIENTS)
    stretches = np.array_split(np.arange(len(rows)), min(len(rows), MAX_COLUMNS))
    norms = [[_largest(rows, stretch, layer) for stretch in stretches] for layer in layers]
    logs = [[math.log10(norm) if norm else None for norm in line] for line in norms]
    finite = [value for line in logs for value in line if value is not None]
    decades = range(math.floor(min(finite, default=0.0)), math.ceil(max(finite, default=0.0)) + 1)
    figure = go.Figure(
        go.Heatmap(
            x=[float(rows[stretch[-1]]["step"]) for stretch in stretches],
            y=[plain(layer.removeprefix(GRADIENT)) for layer in layers],
            z=logs,
            customdata=norms,
            colorscale="Viridis",
            colorbar={"tickvals": list(decades), "ticktext": [f"1e{decade}" for decade in decades], "thickness": 12},
            hovertemplate="%{y}, step %{x}: %{customdata:.3g}",
            hoverongaps=False,
            name="",
        )
    )
    note = "The first layer is on top. A column that lights up from the top down is where instability begins."
    if len(rows) > MAX_COLUMNS:
        note += " Each column shows the largest norm of its stretch of steps."
    height = 120 + ROW_HEIGHT * len(layers)
    axes: dict[str, Any] = {"yaxis": {"autorange": "reversed", "automargin": True}, "xaxis": {"rangemode": "normal"}}
    figure_json = lay_out(figure, x="step", height=height, **axes)
    return Panel(title, note, figure_json, wide=True)


def _largest(rows: list[Row], stretch: NDArray[np.int64], layer: str) -> float | None:
    """The largest norm of some rows; None where there is none, or only zeros, which have no logarithm."""
    return max((row for index in stretch if (row := number(rows[index].get(layer)))), default=None)


def collapse_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Each measure of collapse over epochs, all runs in it, then each run's similarities."""
    if not any(run.diagnostics for run in runs):
        return [Panel("Collapse and similarities", absent=NO_DIAGNOSTICS)]
    style, panels = Style(len(runs)), []
    for key, (title, note) in COLLAPSE.items():
        figure = go.Figure()
        for index, run in enumerate(runs):
            if values_of(run.diagnostics, key):
                figure.add_trace(curve(run, run.diagnostics, key, name=run.name, line=style.line(index)))
        if figure.data:
            panels.append(Panel(title, note, lay_out(figure, showlegend=len(runs) > 1)))
    panels += [panel for run in runs for panel in _similarity_panel(run, len(runs))]
    return panels


def _similarity_panel(run: RunRecord, num_runs: int) -> list[Panel]:
    """Histograms of similarities of positive and negative pairs, with a slider over the monitored steps."""
    rows = [row for row in run.diagnostics if _is_histogram(row)]
    if not rows:
        return []
    kept = [rows[index] for index in np.unique(np.linspace(0, len(rows) - 1, MAX_HISTOGRAMS, dtype=int))]
    figure = go.Figure()
    last = kept[-1]
    edges = np.asarray(last["histogram_edges"], dtype=float)
    names = (
        ("negative_histogram", "different images", PALETTE[1]),
        ("positive_histogram", "views of one image", PALETTE[0]),
    )
    for key, name, colour in names:
        figure.add_trace(
            go.Bar(
                x=((edges[1:] + edges[:-1]) / 2).tolist(),
                y=_shares(last[key]),
                width=np.diff(edges).tolist(),
                name=name,
                marker={"color": colour, "opacity": 0.6, "line": {"width": 0}},
                hovertemplate="%{x:.2f}: %{y:.1%}",
            )
        )
    steps = [
        {
            "label": f"{run.epoch_of(row):.3g}",
            "method": "restyle",
            "args": [{"y": [_shares(row[key]) for key, _, _ in names]}, [0, 1]],
        }
        for row in kept
        if list(row["histogram_edges"]) == list(last["histogram_edges"])
    ]
    grey = "rgba(127, 127, 127, 0.5)"
    layout: dict[str, Any] = {
        "barmode": "overlay",
        "bargap": 0,
        "sliders": [
            {
                "active": len(steps) - 1,
                "steps": steps,
                "currentvalue": {"prefix": "epoch "},
                "pad": {"t": 44},
                **{"bgcolor": grey, "bordercolor": grey, "activebgcolor": grey, "tickcolor": grey},
            }
        ],
        "xaxis": {"range": [-1, 1]},
        "legend": {"y": 1.02, "yanchor": "bottom"},
    }
    title = "Similarities" if num_runs == 1 else f"Similarities, {run.name}"
    note = "Cosine similarity of embeddings. Apart is good; both heaps at 1 is collapse. The slider is over epochs."
    figure_json = lay_out(figure, x="cosine similarity", y="share of pairs", height=400, **layout)
    return [Panel(title, note, figure_json, wide=True)]


def _is_histogram(row: Row) -> bool:
    parts = [row.get(key) for key in ("histogram_edges", "positive_histogram", "negative_histogram")]
    lists = [part for part in parts if isinstance(part, list)]
    if len(lists) < len(parts) or any(number(value) is None for part in lists for value in part):
        return False
    bins = len(lists[0]) - 1
    return bins > 0 and all(len(counts) == bins for counts in lists[1:])


def _shares(counts: list[float]) -> list[float]:
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]
