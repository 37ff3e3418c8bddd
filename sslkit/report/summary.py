"""A run in a few numbers, its alarms and its settings: the top of a report, and the output of ``sslkit report``."""

from dataclasses import dataclass
from statistics import median

from sslkit.recipe.resolve import changes
from sslkit.report.chance_level import chance_of
from sslkit.report.figures import values_of
from sslkit.report.run_record import RunRecord


@dataclass(frozen=True)
class Alarm:
    """An alarm of a run's diagnostics.

    Attributes:
        run: Name of the run.
        message: The alarm.
        first: Epoch of the first diagnosis that raised it.
        last: Epoch of the last diagnosis that raised it.
        active: Whether the newest diagnosis raised it.
    """

    run: str
    message: str
    first: float
    last: float
    active: bool


@dataclass(frozen=True)
class Summary:
    """The main numbers of a run.

    Attributes:
        name: Name of the run.
        step: Step of the last row of metrics.
        epoch: Epoch of the last row of metrics.
        epochs: Epochs of the whole run.
        loss: Last loss, or None.
        chance: Loss at chance, or None if unknown.
        accuracy: Last pretext accuracy, or None.
        knn: First, best and last accuracy of the monitor, or None.
        images_per_second: Median over the run, or None.
        alarms: Alarms of the run, active ones first.
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
    """The main numbers of a run."""
    speeds = [row["images_per_second"] for row in values_of(run.metrics, "images_per_second")]
    monitored = [row["accuracy"] for row in values_of(run.results, "accuracy") if row.get("by") == "monitor"]
    chance = chance_of(run.recipe, run.num_images)
    return Summary(
        name=run.name,
        step=int(run.metrics[-1]["step"]),
        epoch=run.last_epoch,
        epochs=run.recipe.train.epochs,
        loss=_last(run, "loss"),
        chance=chance[0] if chance else None,
        accuracy=_last(run, "accuracy"),
        knn=(monitored[0], max(monitored), monitored[-1]) if monitored else None,
        images_per_second=median(speeds) if speeds else None,
        alarms=alarms_of(run),
    )


def _last(run: RunRecord, key: str) -> float | None:
    rows = values_of(run.metrics, key)
    return float(rows[-1][key]) if rows else None


def alarms_of(run: RunRecord) -> list[Alarm]:
    """Every alarm of a run once, active ones first."""
    raised: dict[str, list[int]] = {}
    for index, row in enumerate(run.diagnostics):
        alarms = row.get("alarms")
        for message in alarms if isinstance(alarms, list) else []:
            raised.setdefault(str(message), []).append(index)
    found = [
        Alarm(
            run.name,
            message,
            run.epoch_of(run.diagnostics[indices[0]]),
            run.epoch_of(run.diagnostics[indices[-1]]),
            indices[-1] == len(run.diagnostics) - 1,
        )
        for message, indices in raised.items()
    ]
    return sorted(found, key=lambda alarm: (not alarm.active, alarm.first))


def facts(run: RunRecord, summary: Summary) -> dict[str, str]:
    """Settings, versions and throughput of a run, as the table of a report shows them."""
    recipe, versions = run.recipe, run.versions
    train, optim, schedule = recipe.train, recipe.optim, recipe.schedule
    options = ", ".join(f"{key} {value}" for key, value in recipe.method.model_dump(exclude_none=True).items())
    speed = summary.images_per_second
    return {
        "method": f"{recipe.method_name} ({options})",
        "backbone": recipe.backbone.name + (", pretrained" if recipe.backbone.pretrained else ""),
        "data": f"{recipe.data.title} [{recipe.data.split}], {run.num_images} images in full batches",
        "views": f"{recipe.views.policy}, {recipe.views.size} pixels",
        "optimizer": f"{optim.name}, peak learning rate {recipe.peak_lr:g}, weight decay {optim.weight_decay:g}",
        "schedule": f"{schedule.decay}, warm-up epochs {schedule.warmup_epochs:g}",
        "length": f"step {summary.step}, epoch {summary.epoch:g} of {summary.epochs}",
        "batch size": f"{train.batch_size}" + (f" in slices of {train.micro_batch}" if train.micro_batch else ""),
        "precision": "float32" if train.precision == "no" else train.precision,
        "seed": str(train.seed),
        "processes": versions.get("processes", "not recorded by this version of sslkit"),
        "throughput": f"{speed:.0f} images/s (median)" if speed else "not logged",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if name != "processes")
        or "not recorded",
    }


def differences(runs: list[RunRecord]) -> list[tuple[str, list[str]]]:
    """For each run but the first: its name, and the keys of its recipe that differ from the first run's."""
    tables = [run.recipe.as_tables() for run in runs]
    return [(run.name, changes(tables[0], table)) for run, table in zip(runs[1:], tables[1:], strict=True)]
