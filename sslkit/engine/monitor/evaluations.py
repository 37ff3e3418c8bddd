"""The evaluations of a run while it trains: kNN every few epochs, diagnostics every few steps, and their alarms."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, astuple
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sslkit.distributed.collectives import max_over_processes
from sslkit.engine.logging.logger import RunLogger, kind_of
from sslkit.engine.monitor.alarms import data_alarm, dip_alarm, leak_alarm, read_curve, teacher_alarm
from sslkit.engine.monitor.baseline_scores import score_baselines
from sslkit.engine.monitor.diagnostics import Diagnostics
from sslkit.engine.monitor.image_variety import sample_variety
from sslkit.engine.monitor.knn_monitor import KnnMonitor
from sslkit.engine.state import TrainingState
from sslkit.engine.step import StepResult
from sslkit.errors import UserError
from sslkit.evaluate.evaluation_result import bootstrap_interval, verdict_of
from sslkit.evaluate.protocol import protocol_hash
from sslkit.files.jsonl_reader import rows_of
from sslkit.methods import Progress
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.progress import group
from sslkit.text import format_duration


class RunMonitor:
    """Evaluates the encoder of a run while it trains. All processes call it at the same steps.

    While a GPU trains, the CPU computes the numbers of diagnostics in a thread. `finish` waits for them; it is called
    before anything is written that comes after them. As a context manager, a monitor finishes on exit.
    """

    def __init__(self, state: TrainingState, logger: RunLogger, knn: KnnMonitor | None) -> None:
        self.state, self.logger, self.knn = state, logger, knn
        self.in_background = state.accelerator.device.type == "cuda"  # on a CPU both would share the cores
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="diagnostics")
        self.computing: tuple[int, Future[dict[str, Any]]] | None = None  # the step, and its line
        self.diagnostics: Diagnostics | None = None
        if state.recipe.monitor.diagnose_every:
            self.diagnostics = Diagnostics(state.recipe, state.source, state.accelerator)

    def __enter__(self) -> "RunMonitor":
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            self.finish()
        finally:
            self.thread.shutdown()

    def finish(self) -> None:
        """Log the diagnostics that are being computed, if any."""
        if self.computing is not None:
            (step, line), self.computing = self.computing, None
            self._log_diagnostics(line.result(), step, knn_measured=False)

    def knn_is_due(self, step: int) -> bool:
        """Whether kNN is measured after ``step`` steps: every few epochs, and at the end."""
        if self.knn is None:
            return False
        period = (self.state.recipe.monitor.every_epochs or 0) * self.state.steps_per_epoch
        return step % period == 0 or step == self.state.last_step

    def check_data(self) -> None:
        """Raise an alarm if the images hardly differ; called once, on the first process, before the first step."""
        alarms = data_alarm(*astuple(sample_variety(self.state.source, self.state.recipe.train.seed)))
        self.logger.log_alarms(alarms, 0)
        if self.diagnostics is not None:
            self.diagnostics.data_alarms = alarms

    def resume(self) -> None:
        """Read earlier diagnostics, and measure kNN now if the run was stopped between a checkpoint and its kNN."""
        logger, step = self.logger, self.state.step
        if self.diagnostics and logger.active:
            self.diagnostics.resume(rows_of(logger.folder / "diagnostics.jsonl", logger.log_message))
        if not step or not self.knn_is_due(step):
            return
        rows = rows_of(logger.folder / "results.jsonl", logger.log_message) if logger.active else []
        measured = any(row.get("by") == "monitor" and row["step"] == step for row in rows)
        missing = logger.active and not measured
        if max_over_processes(torch.tensor(float(missing), device=self.state.accelerator.device)) > 0:
            self._evaluate_sample()

    def is_due(self, step: int) -> bool:
        """Whether kNN or diagnostics are computed after ``step`` steps."""
        return self.knn_is_due(step) or self._diagnostics_are_due(step)

    def observe(self, result: StepResult) -> None:
        """Record the gradients of a step."""
        if self.diagnostics is not None and not result.skipped:
            self.diagnostics.observe(result.step + 1, result.grad_norm, result.layer_gradients)

    def after_step(self, views: Sequence[Tensor], *, stops: bool) -> bool:
        """Evaluate if that is due after the step of these views; returns whether kNN was measured.

        A run that ``stops`` before its end leaves kNN to its continuation.
        """
        step = self.state.step
        if self.is_due(step):
            self.finish()
        if self.knn_is_due(step) and not stops:
            self._evaluate_sample()
            return True
        if self.diagnostics is not None and self._diagnostics_are_due(step):
            compute = self.diagnostics.start_of_batch(self.state.method.encoder, views)
            if self.in_background and self.logger.active:
                self.computing = step, self.thread.submit(compute)
            else:
                self._log_diagnostics(compute(), step, knn_measured=False)
        if self._must_finish(step):
            self.finish()
        return False

    def _must_finish(self, step: int) -> bool:
        """Whether they are computed, or must be now, as some trackers take no earlier step than the last."""
        if self.computing is None or self.computing[1].done() or step == self.state.last_step:
            return True
        tracked = self.logger.trackers is not None and bool(self.logger.trackers.threads)
        next_is_logged = (step + 1) % self.state.recipe.train.log_every == 0 or self._ends_epoch(step + 1)
        return tracked and next_is_logged

    def _ends_epoch(self, step: int) -> bool:
        return step % self.state.steps_per_epoch == 0 or step == self.state.last_step

    def _diagnostics_are_due(self, step: int) -> bool:
        return self.diagnostics is not None and (self.diagnostics.is_due(step) or step == self.state.last_step)

    def _evaluate_sample(self) -> None:
        """Measure kNN, then diagnostics of a fixed sample of the data."""
        measured = self._measure_knn()
        if self.diagnostics is not None:
            fields = self.diagnostics.of_sample(self.state.method.encoder)
            self._log_diagnostics(fields, self.state.step, knn_measured=measured)

    def _measure_knn(self) -> bool:
        """Measure and log the kNN accuracy; returns whether this process has written it to results.jsonl."""
        assert self.knn is not None
        logger, step, started = self.logger, self.state.step, time.monotonic()
        epoch = step / self.state.steps_per_epoch
        try:
            with group(f"epoch {epoch:g}, kNN"):
                accuracy = self.knn(self.state.method.encoder, partial(logger.log_image, "neighbours", step))
        except UserError as error:  # the same on all processes: it is about the images of all of them
            logger.log_message(f"WARNING: epoch {epoch:g}: kNN cannot be measured: {error}; the run continues")
            return False
        without = f", without {self.knn.left_out} images that cannot be read" if self.knn.left_out else ""
        seconds = format_duration(time.monotonic() - started)
        data = self.knn.pair.description
        logger.log_message(f"epoch {epoch:g}: kNN {accuracy:.2%} on {data}{without} ({seconds})")
        standing = self._compare() if step == self.state.last_step else {}
        if not logger.active:
            return False
        left_out = {"left_out": self.knn.left_out} if self.knn.left_out else {}
        settings = {**self.knn.settings, **left_out}
        return logger.log_result(
            {
                "by": "monitor",
                "step": step,
                "epoch": epoch,
                "evaluation": str(self.knn.protocol),
                "data": data,
                "accuracy": accuracy,
                "interval": bootstrap_interval(accuracy, self.knn.scored),
                "protocol": settings,
                "protocol_hash": protocol_hash(settings),
                **left_out,
                **standing,
            }
        )

    def _compare(self) -> dict[str, Any]:
        """Fields of results.jsonl on how the encoder just measured stands against baselines; empty if unknown."""
        assert self.knn is not None
        try:
            scores = score_baselines(self.knn, self.state.method.encoder, self.state.recipe)
        except UserError as error:
            self.logger.log_message(f"WARNING: kNN of the baselines cannot be measured: {error}")
            return {}
        found = ", ".join(f"{score.encoder} {score.accuracy:.2%}" for score in scores[1:])
        self.logger.log_message(f"kNN on the same images: {found}")
        self.logger.log_message(verdict := verdict_of(scores))
        return {"scores": list(map(asdict, scores)), "verdict": verdict}

    def _log_diagnostics(self, fields: dict[str, Any], step: int, *, knn_measured: bool) -> None:
        """Write a line of diagnostics.jsonl, with the alarms of the kNN curve if a kNN of this step is in it."""
        if not self.logger.active:
            return
        state, alarms = self.state, list(fields["alarms"])
        if knn_measured:
            alarms += self._curve_alarms(alarms)
        for teacher in list(state.method.teachers().values())[:1]:
            alarms += teacher_alarm(teacher.momentum_at(Progress(0, 1)))
        epoch = round(step / state.steps_per_epoch, 6)
        self.logger.log_diagnostics({"step": step, "epoch": epoch, **fields, "alarms": alarms})

    def _curve_alarms(self, raised: list[str]) -> list[str]:
        """Alarms of the kNN just measured, compared with those before it."""
        assert self.knn is not None
        logger, method = self.logger, self.state.method
        try:
            rows = (rows_of(logger.folder / name, logger.log_message) for name in ("metrics.jsonl", "results.jsonl"))
            curve = read_curve(*rows)
        except UserError as error:
            logger.log_message(f"WARNING: {error}; without it there are no alarms about kNN")
            return []
        test_images = len(self.knn.pair.test)
        alarms = dip_alarm(curve, test_images)
        # Features that collapse make kNN fall too, without any leak.
        if not any(kind_of(alarm) == "collapse" for alarm in raised + alarms):
            batch_norm = has_batch_norm(method.backbone)
            # A query is normalised in the same small group of images as its key, so that they reveal each other.
            exposed = batch_norm and method.bn_groups > 1 and not method.shuffle_keys
            alarms += leak_alarm(curve, test_images, exposed=exposed, batch_norm=batch_norm)
        return alarms
