"""What a run measures on its way: lines of metrics, kNN when it is due, diagnostics."""

import time
from functools import partial

import torch

from sslkit.data.loader import Batch
from sslkit.durations import duration
from sslkit.engine.alarms import dip_alarm, leak_alarm, read_curve, teacher_alarm
from sslkit.engine.clock import StepClock
from sslkit.engine.diagnostics import Diagnostics
from sslkit.engine.journal import Journal, kind_of
from sslkit.engine.lines import read_lines
from sslkit.engine.training import Training
from sslkit.evaluate.protocol import bootstrap_interval, protocol_hash
from sslkit.methods import Method
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.parts.collectives import max_over_processes


def report(
    training: Training,
    journal: Journal,
    clock: StepClock,
    done: int,
    fields: dict[str, float],
    layers: dict[str, float],
) -> None:
    """One line of metrics and the progress line, on which ``layers`` are left out. ``done`` counts updates made."""
    epoch = done / training.steps_per_epoch
    rate, waiting = clock.window()
    speed = {"images_per_second": rate, "data_wait": waiting}
    journal.record({"step": done, "epoch": round(epoch, 6), **fields, **speed, **layers})
    left = (training.last_step - done) * training.recipe.train.batch_size / max(rate, 1e-9)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in fields.items())
    epochs = training.recipe.train.epochs
    journal.show(
        f"epoch {epoch:.2f}/{epochs}  {shown}  {rate:.0f} img/s  waiting for data {waiting:.0%}  ETA {duration(left)}"
    )


def epoch_ends(training: Training, done: int) -> bool:
    """Whether an epoch, or the run, ends with update ``done``."""
    return done % training.steps_per_epoch == 0 or done == training.last_step


def monitor_is_due(training: Training, done: int) -> bool:
    """Every so many whole epochs, and at the end."""
    if training.monitor is None:
        return False
    every = training.recipe.monitor.every_epochs * training.steps_per_epoch
    return done % every == 0 or done == training.last_step


def measure_what_is_owed(training: Training, journal: Journal) -> None:
    """The kNN of the checkpoint that a run continues from, if it was stopped before that was measured."""
    start = training.start_step
    if training.diagnostics and journal.active:
        training.diagnostics.remember(read_lines(journal.folder / "diagnostics.jsonl"))
    if not start or not monitor_is_due(training, start):
        return
    missing = journal.active and not any(
        row.get("by") == "monitor" and row.get("step") == start for row in read_lines(journal.folder / "results.jsonl")
    )
    if max_over_processes(torch.tensor(float(missing), device=training.accelerator.device)) > 0:
        measure(training, journal, None, start, with_knn=True)


def measure(training: Training, journal: Journal, batch: Batch | None, done: int, *, with_knn: bool) -> None:
    """kNN if it is asked for, and what diagnostics are due."""
    if with_knn:
        measure_knn(training, journal, done)
    diagnose(training, journal, None if with_knn else batch, done)


def measure_knn(training: Training, journal: Journal, done: int) -> None:
    """Score the backbone by kNN and write it down."""
    assert training.monitor is not None
    started = time.monotonic()
    show = partial(journal.picture, "neighbours", done) if journal.shows_pictures else None
    accuracy = training.monitor(training.method.backbone, show)
    epoch = done / training.steps_per_epoch
    if accuracy is None:
        journal.say(f"epoch {epoch:g}: kNN cannot be measured, the features are not finite")
        return
    left_out = training.monitor.left_out
    if journal.active:
        settings = {**training.monitor.settings, **({"left_out": left_out} if left_out else {})}
        journal.result(
            {
                "by": "monitor",
                "step": done,
                "epoch": epoch,
                "evaluation": str(training.monitor.protocol),
                "data": training.monitor.pair.description,
                "accuracy": accuracy,
                "interval": bootstrap_interval(accuracy, training.monitor.scored),
                "protocol": settings,
                "protocol_hash": protocol_hash(settings),
                **({"left_out": left_out} if left_out else {}),
            }
        )
    without = f", without {left_out} images that cannot be read" if left_out else ""
    journal.say(f"epoch {epoch:g}: kNN {accuracy:.2%}{without} ({duration(time.monotonic() - started)})")


def diagnose(training: Training, journal: Journal, batch: Batch | None, done: int) -> None:
    """Write a line of diagnostics if one is due: of the batch, or, without one, of a fixed sample after a kNN."""
    diagnostics: Diagnostics | None = training.diagnostics
    if diagnostics is None:
        return
    backbone = training.method.backbone
    if batch is None:
        fields = diagnostics.of_sample(backbone)
    elif diagnostics.is_due(done) or done == training.last_step:
        fields = diagnostics.of_batch(backbone, batch.views)
    else:
        return
    if not journal.active:
        return
    if batch is None and training.monitor:
        curve = read_curve(*(read_lines(journal.folder / name) for name in ("metrics.jsonl", "results.jsonl")))
        test_images = len(training.monitor.pair.test)
        fields["alarms"] += dip_alarm(curve, test_images)
        # Features that collapse have a falling kNN too, and nothing to do with a leak.
        if not any(kind_of(alarm) == "collapse" for alarm in fields["alarms"]):
            batch_norm, exposed = has_batch_norm(backbone), shares_batch_statistics(training.method)
            fields["alarms"] += leak_alarm(curve, test_images, exposed=exposed, batch_norm=batch_norm)
    if hasattr(training.method, "teacher_backbone"):
        fields["alarms"] += teacher_alarm(getattr(training.recipe.method, "momentum", None))
    journal.diagnosis({"step": done, "epoch": round(done / training.steps_per_epoch, 6), **fields})


def shares_batch_statistics(method: Method) -> bool:
    """Whether a query is normalised in the same small group of images as its key, which then give each other away."""
    return method.bn_groups > 1 and not method.shuffle_keys and has_batch_norm(method.backbone)
