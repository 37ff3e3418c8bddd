"""Figures of a run's health: gradient norms by layer, and the measures of collapse in ``diagnostics.jsonl``."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from sslkit.files.jsonl_reader import Row, number
from sslkit.report.figures import PALETTE, Panel, escape_html, metric_panel, to_json
from sslkit.report.run_record import RunRecord

GRADIENT = "gradient/"
MAX_COLUMNS = 400
MAX_HISTOGRAMS = 40
ROW_HEIGHT = 22
SLIDER_GREY = "rgba(127, 127, 127, 0.5)"

NO_GRADIENTS = "Not logged: set [monitor] layer_gradients = true to see in which layer the gradient grows first."
NO_DIAGNOSTICS = "Not logged: set [monitor] diagnose_every, which is on unless set to 0."
# Measures of a diagnosis, with title and interpretation.
COLLAPSE = {
    "embedding_std": Panel("Spread of the embeddings", "Near 0 if all images have the same embedding."),
    "effective_rank": Panel("Effective rank", "Directions that the embeddings use; a drop is dimensional collapse."),
    "alpha_req": Panel("Alpha-ReQ", "Decay of the eigenvalues: about 1 is good; far above 1, few directions dominate."),
    "lidar": Panel("LiDAR", "Number of directions that separate images, relative to views of one image."),
    "alignment": Panel("Alignment", "Distance between two views of an image; decreases while the method learns."),
    "uniformity": Panel("Uniformity", "Lower is more uniform on the sphere; near 0 is collapse."),
}
HISTOGRAMS = (
    ("negative_histogram", "different images", PALETTE[1]),
    ("positive_histogram", "views of one image", PALETTE[0]),
)


def gradient_panel(run: RunRecord, title: str) -> Panel:
    """Heat map of the gradient norm of each layer over steps, on a logarithmic scale."""
    layers = list(dict.fromkeys(key for row in run.metrics for key in row if key.startswith(GRADIENT)))
    rows = [row for row in run.metrics if any(key in row for key in layers)]
    if not layers:
        return Panel(title, absent=NO_GRADIENTS)
    intervals = np.array_split(np.arange(len(rows)), min(len(rows), MAX_COLUMNS))
    norms = [[_largest(rows, interval, layer) for interval in intervals] for layer in layers]
    logs = [[math.log10(norm) if norm else None for norm in line] for line in norms]
    finite = [value for line in logs for value in line if value is not None]
    decades = range(math.floor(min(finite, default=0.0)), math.ceil(max(finite, default=0.0)) + 1)
    figure = go.Figure(
        go.Heatmap(
            x=[float(rows[interval[-1]]["step"]) for interval in intervals],
            y=[escape_html(layer.removeprefix(GRADIENT)) for layer in layers],
            z=logs,
            customdata=norms,
            colorscale="Viridis",
            colorbar={"tickvals": list(decades), "ticktext": [f"1e{decade}" for decade in decades], "thickness": 12},
            hovertemplate="%{y}, step %{x}: %{customdata:.3g}",
            hoverongaps=False,
            name="",
        )
    )
    note = "The first layer is at the top. Instability starts where a column becomes bright from the top down."
    if len(rows) > MAX_COLUMNS:
        note += " Each column shows the largest norm of its interval of steps."
    axes: dict[str, Any] = {"yaxis": {"autorange": "reversed", "automargin": True}, "xaxis": {"rangemode": "normal"}}
    return Panel(title, note, to_json(figure, x="step", height=120 + ROW_HEIGHT * len(layers), **axes), wide=True)


def _largest(rows: list[Row], interval: NDArray[np.int64], layer: str) -> float | None:
    """The largest norm of some rows; None if there is none, or only zeros, which have no logarithm."""
    return max((norm for index in interval if (norm := number(rows[index].get(layer)))), default=None)


def collapse_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Each measure of collapse over epochs, for all runs, then the similarities of each run."""
    if not any(run.diagnostics for run in runs):
        return [Panel("Collapse and similarities", absent=NO_DIAGNOSTICS)]
    panels = [metric_panel(runs, "diagnostics", key, panel) for key, panel in COLLAPSE.items()]
    panels += [_similarity_panel(run, len(runs)) for run in runs]
    return [panel for panel in panels if panel.figure]


def _similarity_panel(run: RunRecord, num_runs: int) -> Panel:
    """Histograms of the similarities of positive and negative pairs, with a slider over epochs."""
    title = "Similarities" if num_runs == 1 else f"Similarities, {run.name}"
    rows = [row for row in run.diagnostics if _has_histograms(row)]
    if not rows:
        return Panel(title)
    last = rows[-1]
    edges = np.asarray(last["histogram_edges"], dtype=float)
    figure = go.Figure(
        [
            go.Bar(
                x=((edges[1:] + edges[:-1]) / 2).tolist(),
                y=_fractions(last[key]),
                width=np.diff(edges).tolist(),
                name=name,
                marker={"color": colour, "opacity": 0.6, "line": {"width": 0}},
                hovertemplate="%{x:.2f}: %{y:.1%}",
            )
            for key, name, colour in HISTOGRAMS
        ]
    )
    layout: dict[str, Any] = {
        "barmode": "overlay",
        "bargap": 0,
        "sliders": [_slider(run, rows)],
        "xaxis": {"range": [-1, 1]},
        "legend": {"y": 1.02, "yanchor": "bottom"},
    }
    note = (
        "Cosine similarities of embeddings. Separate distributions are good; if both are at 1, the embeddings have "
        "collapsed. The slider selects the epoch."
    )
    figure_json = to_json(figure, x="cosine similarity", y="fraction of pairs", height=400, **layout)
    return Panel(title, note, figure_json, wide=True)


def _slider(run: RunRecord, rows: list[Row]) -> dict[str, Any]:
    """Plotly's slider over at most `MAX_HISTOGRAMS` diagnoses that have the bins of the last one."""
    kept = [rows[index] for index in np.unique(np.linspace(0, len(rows) - 1, MAX_HISTOGRAMS, dtype=int))]
    steps = [
        {
            "label": f"{run.epoch_of(row):.3g}",
            "method": "restyle",
            "args": [{"y": [_fractions(row[key]) for key, _, _ in HISTOGRAMS]}, [0, 1]],
        }
        for row in kept
        if list(row["histogram_edges"]) == list(rows[-1]["histogram_edges"])
    ]
    return {
        "active": len(steps) - 1,
        "steps": steps,
        "currentvalue": {"prefix": "epoch "},
        "pad": {"t": 44},
        **dict.fromkeys(("bgcolor", "bordercolor", "activebgcolor", "tickcolor"), SLIDER_GREY),
    }


def _has_histograms(row: Row) -> bool:
    edges, *counts = (row.get(key) for key in ("histogram_edges", "positive_histogram", "negative_histogram"))
    lists = [part for part in (edges, *counts) if isinstance(part, list) and None not in map(number, part)]
    return len(lists) == 3 and len(lists[0]) - 1 == len(lists[1]) == len(lists[2]) > 0


def _fractions(counts: list[float]) -> list[float]:
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]
