"""PNG pictures of a run: its curves, and the views that it trains on."""

import io
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from sslkit.data.sources.image_source import open_source
from sslkit.engine.logging.sample_images import views_image
from sslkit.errors import UserError
from sslkit.files.atomic import replace_file
from sslkit.files.jsonl_reader import number
from sslkit.files.run_reader import RECIPE
from sslkit.recipe.resolve import load_saved
from sslkit.report.run_record import read_run
from sslkit.report.standing import baselines_of, compared_row


def draw_run(folder: Path) -> list[Path]:
    """Write ``curves.png``, and ``views.png`` if the data can be read, to the run's ``pictures``; return the paths.

    Raises `UserError` if the folder is not a run or not writable, or if the run has not logged anything yet.
    """
    written = [draw_curves(folder)]
    recipe = load_saved(folder / RECIPE)
    try:
        views = views_image(recipe, open_source(recipe.data).without_labels())
    except UserError:
        return written
    encoded = io.BytesIO()
    Image.fromarray(views).save(encoded, "PNG")
    return [*written, _write(folder / "pictures" / "views.png", encoded)]


def draw_curves(folder: Path) -> Path:
    """Write ``curves.png``: loss, pretext accuracy, learning rate and kNN over epochs. Raises as `draw_run`."""
    run = read_run(folder)
    epochs = [float(row["epoch"]) for row in run.metrics]
    monitored = [row for row in run.results if row.get("by") == "monitor"]
    figure = Figure(figsize=(15, 3.2), layout="constrained")
    axes = figure.subplots(1, 4)
    panels = (("loss", "loss (nats)"), ("accuracy", "pretext accuracy"), ("lr", "learning rate"))
    for axis, (key, title) in zip(axes, panels, strict=False):
        values = [np.nan if (value := number(row.get(key))) is None else value for row in run.metrics]
        axis.plot(epochs, values, color="#2f6db5", linewidth=1.2)
        axis.set(title=title, xlabel="epoch")
    percentages = [100 * row["accuracy"] for row in monitored]
    axes[3].plot(list(map(run.epoch_of, monitored)), percentages, "o-", color="#c4501b")
    if (compared := compared_row(monitored)) is not None:
        for style, baseline in zip(cycle(("--", ":", "-.")), baselines_of(compared), strict=False):
            axes[3].axhline(100 * baseline["accuracy"], color="#7f7f7f", ls=style, label=baseline.get("encoder", ""))
        axes[3].legend(fontsize="small")
    axes[3].set(title="kNN top-1 (%)" if monitored else "kNN top-1: not monitored", xlabel="epoch")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    encoded = io.BytesIO()
    figure.savefig(encoded, dpi=110, format="png")
    return _write(folder / "pictures" / "curves.png", encoded)


def _write(file: Path, encoded: io.BytesIO) -> Path:
    """Write a picture atomically."""
    try:
        file.parent.mkdir(exist_ok=True)
        replace_file(file, [encoded.getbuffer()], shared=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error
    return file
