"""A run in a few numbers, its alarms and its settings: the top of a report, and the output of ``sslkit report``."""

from dataclasses import dataclass
from statistics import median

from sslkit.report.chance_level import chance_of
from sslkit.report.figures import values_of
from sslkit.report.run_record import RunRecord
from sslkit.report.standing import HOW_TO_COMPARE, verdicts_of


@dataclass(frozen=True)
class Alarm:
    """An alarm, and the epochs of the first and the last diagnosis that raised it; active if that is the newest."""

    run: str
    message: str
    first: float
    last: float
    active: bool


@dataclass(frozen=True)
class Summary:
    """The main numbers of a run, as of its last row of metrics. A number that is not known is None."""

    name: str
    step: int
    epoch: float
    epochs: int  # of the whole run
    loss: float | None
    chance: float | None  # the loss at chance
    accuracy: float | None  # of the pretext task
    knn: tuple[float, float, float] | None  # first, best and last accuracy of the monitor
    images_per_second: float | None  # median over the run
    alarms: list[Alarm]
    verdicts: list[str]  # how the encoder stands beside baselines; how to measure it if that is not known


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
        verdicts=verdicts_of(run) or [f"whether it beats random init and raw pixels is not known. {HOW_TO_COMPARE}"],
    )


def _last(run: RunRecord, key: str) -> float | None:
    rows = values_of(run.metrics, key)
    return float(rows[-1][key]) if rows else None


def alarms_of(run: RunRecord) -> list[Alarm]:
    """The distinct alarms of a run: active ones first, then by first occurrence."""
    raised: dict[str, list[int]] = {}
    for index, row in enumerate(run.diagnostics):
        alarms = row.get("alarms")
        for message in alarms if isinstance(alarms, list) else []:
            raised.setdefault(str(message), []).append(index)
    epochs = list(map(run.epoch_of, run.diagnostics))
    found = [
        Alarm(run.name, message, epochs[indices[0]], epochs[indices[-1]], indices[-1] == len(epochs) - 1)
        for message, indices in raised.items()
    ]
    return sorted(found, key=lambda alarm: (not alarm.active, alarm.first))


def facts(run: RunRecord, summary: Summary) -> dict[str, str]:
    """Settings, versions and throughput of a run, as the table of a report shows them."""
    recipe, speed = run.recipe, summary.images_per_second
    train, optim, schedule = recipe.train, recipe.optim, recipe.schedule
    options = ", ".join(f"{key} {value}" for key, value in recipe.method.model_dump(exclude_none=True).items())
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items() if name != "processes")
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
        "processes": run.versions.get("processes", "not recorded by this version of sslkit"),
        "throughput": f"{speed:.0f} images/s (median)" if speed else "not logged",
        "versions": versions or "not recorded",
    }
