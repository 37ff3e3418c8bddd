"""What a run measures on its way: lines of metrics, kNN when it is due, diagnostics."""

import time
from functools import partial

import torch

from sslkit.data.loading.loader import Batch
from sslkit.distributed.collectives import max_over_processes
from sslkit.durations import duration
from sslkit.engine.logging.logger import Journal, kind_of
from sslkit.engine.logging.throughput import StepClock
from sslkit.engine.monitor.alarms import dip_alarm, leak_alarm, read_curve, teacher_alarm
from sslkit.engine.monitor.diagnostics import Diagnostics
from sslkit.engine.state import Training
from sslkit.errors import UserError
from sslkit.evaluate.evaluation_result import bootstrap_interval
from sslkit.evaluate.protocol import protocol_hash
from sslkit.files.jsonl_reader import rows_of
from sslkit.methods import Method
from sslkit.parts.batchnorm import has_batch_norm


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
        training.diagnostics.remember(rows_of(journal.folder / "diagnostics.jsonl", journal.say))
    if not start or not monitor_is_due(training, start):
        return
    missing = journal.active and not any(
        row.get("by") == "monitor" and row["step"] == start
        for row in rows_of(journal.folder / "results.jsonl", journal.say)
    )
    if max_over_processes(torch.tensor(float(missing), device=training.accelerator.device)) > 0:
        measure(training, journal, None, start, with_knn=True)


def measure(training: Training, journal: Journal, batch: Batch | None, done: int, *, with_knn: bool) -> None:
    """kNN if it is asked for, and what diagnostics are due."""
    measured = with_knn and measure_knn(training, journal, done)
    diagnose(training, journal, None if with_knn else batch, done, measured=measured)


def measure_knn(training: Training, journal: Journal, done: int) -> bool:
    """Score the backbone by kNN and write it down; whether that is done, on the disk."""
    assert training.monitor is not None
    started = time.monotonic()
    show = partial(journal.picture, "neighbours", done) if journal.shows_pictures else None
    epoch = done / training.steps_per_epoch
    try:
        accuracy = training.monitor(training.method.backbone, show)
    except UserError as error:  # alike on all processes: it is about the images of all of them
        journal.say(f"WARNING: epoch {epoch:g}: kNN cannot be measured: {error}; the run goes on")
        return False
    if accuracy is None:
        journal.say(f"WARNING: epoch {epoch:g}: kNN cannot be measured, the features are not finite; the run goes on")
        return False
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
    return not journal.results.owed


def diagnose(training: Training, journal: Journal, batch: Batch | None, done: int, *, measured: bool) -> None:
    """Write a line of diagnostics if one is due: of the batch, or, without one, of a fixed sample after a kNN.

    Args:
        training: Whose backbone is looked at.
        journal: Takes the line.
        batch: The step's, or None.
        done: Updates made.
        measured: Whether a kNN of this step is in results.jsonl, to be held against those before it.
    """
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
    if measured:
        fields["alarms"] += _alarms_of_curve(training, journal, fields["alarms"])
    if hasattr(training.method, "teacher_backbone"):
        fields["alarms"] += teacher_alarm(getattr(training.recipe.method, "momentum", None))
    journal.diagnosis({"step": done, "epoch": round(done / training.steps_per_epoch, 6), **fields})


def _alarms_of_curve(training: Training, journal: Journal, raised: list[str]) -> list[str]:
    """What the kNN just measured says beside those before it."""
    assert training.monitor is not None
    try:
        rows = (rows_of(journal.folder / name, journal.say) for name in ("metrics.jsonl", "results.jsonl"))
        curve = read_curve(*rows)
    except UserError as error:
        journal.say(f"WARNING: {error}; without it there are no alarms of kNN")
        return []
    backbone, test_images = training.method.backbone, len(training.monitor.pair.test)
    alarms = dip_alarm(curve, test_images)
    # Features that collapse have a falling kNN too, and nothing to do with a leak.
    if not any(kind_of(alarm) == "collapse" for alarm in raised + alarms):
        batch_norm, exposed = has_batch_norm(backbone), shares_batch_statistics(training.method)
        alarms += leak_alarm(curve, test_images, exposed=exposed, batch_norm=batch_norm)
    return alarms


def shares_batch_statistics(method: Method) -> bool:
    """Whether a query is normalised in the same small group of images as its key, which then give each other away."""
    return method.bn_groups > 1 and not method.shuffle_keys and has_batch_norm(method.backbone)
