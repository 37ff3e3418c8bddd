"""A run in a few numbers, for the terminal and the top of a page."""

from dataclasses import dataclass
from statistics import median

from sslkit.recipe.resolve import changes
from sslkit.report.chance_level import chance_of
from sslkit.report.figures import values_of
from sslkit.report.health import Alarm, alarms_of
from sslkit.report.run_reader import RunRecord


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        name: The run's.
        step: Updates logged.
        epoch: Passes over the data logged.
        epochs: Passes asked for.
        loss: Of the last line of metrics, or None.
        chance: The loss at chance, or None where it is not known.
        accuracy: Pretext accuracy of the last line, or None.
        knn: The monitor's first, best and last accuracy, or None.
        images_per_second: Median over the lines, or None.
        alarms: What the diagnosis raised, what stands first.
    """

    name: str
    step: int
    epoch: float
    epochs: int
    loss: float | None
    chance: float | None
    accuracy: float | None
    knn: tuple[float, float, float] | None
    images_per_second: float | None
    alarms: list[Alarm]


def summarise(run: RunRecord) -> Summary:
    """The few numbers of a run."""
    speeds = [row["images_per_second"] for row in values_of(run.metrics, "images_per_second")]
    watched = [row["accuracy"] for row in values_of(run.results, "accuracy") if row.get("by") == "monitor"]
    known = chance_of(run.recipe, run.num_images)
    last = run.metrics[-1]
    return Summary(
        name=run.name,
        step=int(last["step"]),
        epoch=float(last["epoch"]),
        epochs=run.recipe.train.epochs,
        loss=_last(run, "loss"),
        chance=known[0] if known else None,
        accuracy=_last(run, "accuracy"),
        knn=(watched[0], max(watched), watched[-1]) if watched else None,
        images_per_second=median(speeds) if speeds else None,
        alarms=alarms_of(run),
    )


def _last(run: RunRecord, key: str) -> float | None:
    rows = values_of(run.metrics, key)
    return float(rows[-1][key]) if rows else None


def facts(run: RunRecord, summary: Summary) -> dict[str, str]:
    """The essentials of a run as the page's table states them."""
    recipe, made_with = run.recipe, run.made_with
    train, optim, schedule = recipe.train, recipe.optim, recipe.schedule
    options = ", ".join(f"{key} {value}" for key, value in recipe.method.model_dump(exclude_none=True).items())
    speed = summary.images_per_second
    return {
        "method": f"{recipe.method_name} ({options})",
        "backbone": recipe.backbone.name + (", pretrained" if recipe.backbone.pretrained else ""),
        "data": f"{recipe.data.title} [{recipe.data.split}], {run.num_images} images in whole batches",
        "views": f"{recipe.views.policy}, {recipe.views.size} pixels",
        "optimizer": f"{optim.name}, peak rate {recipe.peak_lr:g}, weight decay {optim.weight_decay:g}",
        "schedule": f"{schedule.decay}, warm-up epochs {schedule.warmup_epochs:g}",
        "length": f"step {summary.step}, epoch {summary.epoch:g} of {summary.epochs}",
        "batch": f"{train.batch_size}" + (f" in slices of {train.micro_batch}" if train.micro_batch else ""),
        "precision": "float32" if train.precision == "no" else train.precision,
        "seed": str(train.seed),
        "processes": made_with.get("processes", "not recorded by the sslkit that made this run"),
        "throughput": f"{speed:.0f} images/s, median of the log" if speed else "not logged",
        "versions": ", ".join(f"{name} {text}" for name, text in made_with.items() if name != "processes")
        or "not recorded",
    }


def differences(runs: list[RunRecord]) -> list[tuple[str, list[str]]]:
    """For each run but the first, which keys of its recipe differ from the first run's."""
    tables = [run.recipe.as_tables() for run in runs]
    return [(run.name, changes(tables[0], table)) for run, table in zip(runs[1:], tables[1:], strict=True)]
