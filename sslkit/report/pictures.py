"""PNG pictures of a run: its curves, and the views that it trains on."""

import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from sslkit.data.sources.image_source import open_source
from sslkit.engine.logging.sample_images import views_image
from sslkit.errors import UserError
from sslkit.files.atomic import replace_file
from sslkit.files.jsonl_reader import number
from sslkit.report.run_record import RunRecord, read_run

mpl.use("Agg")

from matplotlib import pyplot as plt


def draw_run(folder: Path) -> list[Path]:
    """Write ``pictures/curves.png`` and ``pictures/views.png`` in a run folder and return their paths.

    Only the curves are drawn if the data of the run cannot be read.

    Raises:
        UserError: The folder is not a run, the run has not logged anything yet, or the folder is not writable.
    """
    run = read_run(folder)
    written = [_draw_curves(run)]
    try:
        views = views_image(run.recipe, open_source(run.recipe.data).without_labels())
    except UserError:
        return written
    encoded = io.BytesIO()
    Image.fromarray(views).save(encoded, "PNG")
    return [*written, _write(folder / "pictures" / "views.png", encoded)]


def draw_curves(folder: Path) -> Path:
    """Write ``pictures/curves.png`` in a run folder, without reading the data, and return its path.

    Raises:
        UserError: As `draw_run`.
    """
    return _draw_curves(read_run(folder))


def _draw_curves(run: RunRecord) -> Path:
    """Loss, pretext accuracy, learning rate and kNN accuracy over epochs."""
    epochs = [float(row["epoch"]) for row in run.metrics]
    monitored = [row for row in run.results if row.get("by") == "monitor"]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2), layout="constrained")
    panels = (("loss", "loss (nats)"), ("accuracy", "pretext accuracy"), ("lr", "learning rate"))
    for axis, (key, title) in zip(axes, panels, strict=False):
        values = [np.nan if (value := number(row.get(key))) is None else value for row in run.metrics]
        axis.plot(epochs, values, color="#2f6db5", linewidth=1.2)
        axis.set(title=title, xlabel="epoch")
    axes[3].plot(
        [run.epoch_of(row) for row in monitored],
        [100 * row["accuracy"] for row in monitored],
        "o-",
        color="#c4501b",
    )
    axes[3].set(title="kNN top-1 (%)" if monitored else "kNN top-1: not monitored", xlabel="epoch")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return _write(run.folder / "pictures" / "curves.png", _to_png(figure))


def _to_png(figure: Figure) -> io.BytesIO:
    encoded = io.BytesIO()
    figure.savefig(encoded, dpi=110, format="png")
    plt.close(figure)
    return encoded


def _write(file: Path, encoded: io.BytesIO) -> Path:
    """Write a picture atomically."""
    try:
        file.parent.mkdir(exist_ok=True)
        replace_file(file, [encoded.getbuffer()], shared=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error
    return file
