"""Figures of training: loss with its level at chance, learning rate, speed, and other logged metrics over epochs."""

from collections.abc import Sequence

import plotly.graph_objects as go

from sslkit.files.jsonl_reader import number
from sslkit.report.chance_level import chance_of, queue_full_at
from sslkit.report.figures import (
    GREY,
    MAX_POINTS,
    Panel,
    Style,
    curve,
    horizontal_line,
    join_notes,
    metric_panel,
    published_curve,
    to_json,
)
from sslkit.report.run_record import RunRecord

NOT_LOGGED = "Not logged by this version of sslkit."
# Panels and units of metrics in the order of the page.
METRICS = {
    "accuracy": (Panel("Pretext accuracy", absent="This method does not log a pretext accuracy."), "fraction"),
    "lr": (Panel("Learning rate", absent=NOT_LOGGED), ""),
    "momentum": (Panel("Momentum of the teacher", absent="This method has no momentum teacher."), ""),
    "grad_norm": (Panel("Gradient norm", absent=NOT_LOGGED), "before clipping"),
    "images_per_second": (Panel("Images per second", absent=NOT_LOGGED), ""),
    "data_wait": (Panel("Time waiting for data", absent=NOT_LOGGED), "fraction"),
}
# Runs on GPUs only.
GPU_METRICS = {
    "mfu": (Panel("Model FLOPs utilization (MFU)"), "fraction of the GPU's peak"),
    "device_busy": (Panel("Time with work on the GPU"), "fraction"),
    "peak_memory_gib": (Panel("Peak GPU memory"), "GiB"),
}


def training_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Loss, the metrics that all methods log, and all other metrics of the runs' methods."""
    logged = {key for run in runs for row in run.metrics for key, value in row.items() if number(value) is not None}
    others = sorted(key for key in logged - {"step", "epoch", "loss", *METRICS} if "/" not in key)
    panels = METRICS | {key: GPU_METRICS.get(key, (Panel(key), "")) for key in others}
    return [loss_panel(runs), *(metric_panel(runs, "metrics", key, *panel) for key, panel in panels.items())]


def loss_panel(runs: Sequence[RunRecord]) -> Panel:
    """Loss, its level at chance, the steps in which a queue fills, and published losses."""
    style, figure = Style(len(runs)), go.Figure()
    notes: list[tuple[str, str]] = []
    for index, run in enumerate(runs):
        line = style.line(index)
        figure.add_trace(curve(run, run.metrics, "loss", name=style.name(run, "loss"), line=line))
        if chance := chance_of(run.recipe, run.num_images):
            colour = line["color"] if len(runs) > 1 else GREY
            name = style.name(run, f"chance, {chance[0]:.4g}")
            figure.add_trace(horizontal_line(run, chance[0], name, color=colour, dash="dot"))
            notes.append((run.name, f"the loss at chance is {chance[0]:.4g}, about {chance[1]}."))
        else:
            notes.append((run.name, f"the loss at chance of {run.recipe.method_name} is unknown."))
        published = run.recipe.reference.get("loss_by_epoch")
        figure.add_traces(published_curve(published, style.name(run, "published loss by epoch")))
        notes += [(run.name, note) for note in _mark_queue(figure, run, str(line["color"]))]
    text = join_notes(notes, len(runs))
    if len({note for _, note in notes if note.startswith("the loss at chance is ")}) > 1:
        text += " Losses with different levels at chance cannot be compared."
    if any(len(run.metrics) > MAX_POINTS for run in runs):
        text += " The curve shows the lowest and the highest value of each interval of steps."
    return Panel("Loss", text, to_json(figure, y="loss", height=360), wide=True)


def _mark_queue(figure: go.Figure, run: RunRecord, colour: str) -> list[str]:
    """Shade the steps in which the queue still holds random keys, and describe them."""
    steps = queue_full_at(run.recipe)
    if not steps:
        return []
    end = steps / run.steps_per_epoch
    shown = min(end, run.last_epoch)  # a queue that is never full must not stretch the axis
    figure.add_vrect(x0=0, x1=shown, fillcolor=colour, opacity=0.14, line_width=0, layer="below")
    return [
        f"until step {steps}, epoch {end:.3g} (shaded), the queue still contains some of its initial random keys; "
        "the loss may rise until then."
    ]
