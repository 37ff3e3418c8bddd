"""Pictures of a run: its curves, and the views it learned from."""

import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.augment.views_config import NUM_GLOBAL_VIEWS
from sslkit.data.decode.channels import as_picture
from sslkit.data.loading.replacement import read_or_replace
from sslkit.data.sources.image_source import open_source
from sslkit.errors import UserError, check_path
from sslkit.files.atomic import replace_file
from sslkit.files.jsonl_reader import Row, number, rows_of
from sslkit.recipe.resolve import Recipe, load_saved

mpl.use("Agg")

from matplotlib import pyplot as plt

NUM_IMAGES = 10
REPEATS = 2


def draw_run(run: Path) -> list[Path]:
    """Draw ``pictures/curves.png`` and ``pictures/views.png`` in a run folder and return their paths.

    Where the run's data is no longer there, the curves are drawn alone.

    Raises:
        UserError: Not a run folder, or one that has not logged anything yet.
    """
    curves = draw_curves(run)
    try:
        return [curves, _draw_views(load_saved(run / "recipe.toml"), run / "pictures" / "views.png")]
    except UserError:
        return [curves]


def draw_curves(run: Path) -> Path:
    """Draw ``pictures/curves.png`` in a run folder, which asks nothing of its data, and return its path.

    Raises:
        UserError: Not a run folder, one that has not logged anything yet, or one that cannot be written to.
    """
    check_path(run, "RUN")
    if not (run / "recipe.toml").is_file():
        raise UserError(f"{run}: not a run folder (no recipe.toml)")
    metrics = rows_of(run / "metrics.jsonl")
    if not metrics:
        raise UserError(f"{run}: nothing to draw yet, metrics.jsonl is empty")
    return _draw_curves(run, metrics, run / "pictures" / "curves.png")


def _draw_curves(run: Path, metrics: list[Row], file: Path) -> Path:
    """Loss, pretext accuracy, schedules, and kNN over epochs."""
    epochs = [float(row["epoch"]) for row in metrics]
    watched = [row for row in rows_of(run / "results.jsonl") if row.get("by") == "monitor"]
    scores = [(row["epoch"], 100 * row["accuracy"]) for row in watched if "epoch" in row]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2), layout="constrained")
    panels = (("loss", "loss (nats)"), ("accuracy", "pretext accuracy"), ("lr", "learning rate"))
    for axis, (key, title) in zip(axes, panels, strict=False):
        values = [np.nan if (value := number(row.get(key))) is None else value for row in metrics]
        axis.plot(epochs, values, color="#2f6db5", linewidth=1.2)
        axis.set(title=title, xlabel="epoch")
    if scores:
        axes[3].plot(*zip(*scores, strict=True), "o-", color="#c4501b")
    axes[3].set(title="kNN top-1 (%)" if scores else "kNN top-1: not monitored", xlabel="epoch")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, file)


def _draw_views(recipe: Recipe, file: Path) -> Path:
    """Each row an image: as it is, then pairs of views from successive epochs."""
    source = open_source(recipe.data).without_labels()
    pipeline = ViewPipeline(recipe.views, recipe.train.seed)
    samples = np.linspace(0, len(source) - 1, min(NUM_IMAGES, len(source)), dtype=int)
    columns = 1 + REPEATS * NUM_GLOBAL_VIEWS
    figure, axes = plt.subplots(len(samples), columns, figsize=(columns * 1.3, len(samples) * 1.3), squeeze=False)
    for row, sample in zip(axes, samples, strict=True):
        image = read_or_replace(source, recipe.train.seed, epoch=0, sample=int(sample)).pixels
        views = [view for epoch in range(REPEATS) for view in pipeline(image, epoch, int(sample))[:NUM_GLOBAL_VIEWS]]
        for axis, picture in zip(row, [image, *views], strict=True):
            axis.imshow(as_picture(picture))
            axis.set_axis_off()
    names = [f"view {view + 1}, epoch {epoch + 1}" for epoch in range(REPEATS) for view in range(NUM_GLOBAL_VIEWS)]
    for axis, name in zip(axes[0], ["image", *names], strict=True):
        axis.set_title(name, fontsize=7)
    figure.tight_layout(pad=0.4)
    return _save(figure, file)


def _save(figure: Figure, file: Path) -> Path:
    """Write a picture, whole or not at all, in the place of an older one."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    plt.close(figure)
    try:
        file.parent.mkdir(exist_ok=True)
        replace_file(file, [drawn.getbuffer()], shared=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error
    return file
