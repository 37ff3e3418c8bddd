"""The training loop, to be read from top to bottom. `sslkit.engine.step.train_step` is one step of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sslkit.data.batch import Batch
from sslkit.distributed.collectives import broadcast_buffers, max_over_processes, mean_over_processes
from sslkit.distributed.consistency import compare_weights
from sslkit.distributed.heartbeat import Heartbeat
from sslkit.engine.checkpoint.writer import SaveError, Saver
from sslkit.engine.logging.logger import RunLogger
from sslkit.engine.logging.throughput import ThroughputMeter
from sslkit.engine.monitor.evaluations import RunMonitor
from sslkit.engine.resilience.crash_dump import try_to_write_crash_dump
from sslkit.engine.resilience.guard import Guard
from sslkit.engine.resilience.preemption import StopRequest
from sslkit.engine.resilience.rewind import is_rewind_point
from sslkit.engine.run_folder.dataset_identity import BadSamples, recorded_names_digest
from sslkit.engine.setup import make_train_loader
from sslkit.engine.state import TrainingState
from sslkit.engine.step import StepResult, train_step
from sslkit.text import format_duration


@dataclass(frozen=True)
class RunServices:
    """What the loop reports to and takes orders from.

    Attributes:
        folder: Run folder.
        logger: Metrics, messages and trackers.
        saver: Writes checkpoints.
        monitor: kNN and diagnostics.
        bad_samples: The images that cannot be read.
        stop: Signals and the time limit.
        heartbeat: Tells the other processes what this one does.
    """

    folder: Path
    logger: RunLogger
    saver: Saver
    monitor: RunMonitor
    bad_samples: BadSamples
    stop: StopRequest
    heartbeat: Heartbeat


def run_loop(state: TrainingState, run: RunServices) -> str:
    """Train from ``state.step`` to the last step, or until asked to stop.

    Returns:
        Why training stopped before its end; empty if it did not.

    Raises:
        BadStepError: The loss or the gradient of a step was bad, and ``[guard]`` says to stop.
        RewindError: There were too many consecutive bad steps; see `sslkit.engine.resilience.rewind`.
    """
    guard = Guard(state.recipe.guard, state.recovery, state.method)
    meter = ThroughputMeter(state.recipe.train.batch_size)
    last_save = time.monotonic()
    run.heartbeat.at(state.step, "evaluating")
    run.monitor.resume()
    state.method.train()
    run.heartbeat.at(state.step, "starting")
    for batch in meter.timed(make_train_loader(state)):
        run.heartbeat.at(state.step, "in forward and backward")
        result = train_step(state, batch, guard, poll=partial(poll_flags, state, run, batch, last_save))
        save_asked, stop_asked, bad_images = result.flags
        meter.count_step()

        run.heartbeat.at(state.step, "in bookkeeping")
        if bad_images:
            run.bad_samples.collect(batch, result.step // state.steps_per_epoch, state.step)
        if result.problem:
            refuse_step(state, run, guard, result)
        log_step(state, run.logger, meter, result)
        if (period := state.recipe.guard.compare_every) and state.step % period == 0:
            compare_weights(state.method, state.step, state.accelerator.device)

        run.heartbeat.at(state.step, "evaluating")
        ends = state.step == state.last_step
        if not result.skipped:
            run.monitor.observe_gradients(result.grad_norm, result.layer_gradients)
        evaluates = run.monitor.knn_is_due(state.step) and (ends or not stop_asked)
        if evaluates:
            run.monitor.evaluate_sample()
        else:
            run.monitor.evaluate_batch(result.batch)

        saves = ends or stop_asked or (save_asked and not state.recovery.skipped)
        if saves:
            run.heartbeat.at(state.step, "saving")
            save_checkpoint(state, run.saver, wait=ends or stop_asked)
            last_save = time.monotonic()
        if stop_asked and not ends:
            return run.stop.reason or "a signal to another process"
        if evaluates or saves:
            meter.restart()
        run.heartbeat.at(state.step, "waiting for data")
    return ""


def poll_flags(state: TrainingState, run: RunServices, batch: Batch, last_save: float) -> Sequence[bool]:
    """What this process asks all processes to do after the step: save, stop, exchange unreadable images."""
    return save_is_due(state, run.monitor, last_save), bool(run.stop.reason), bool(run.bad_samples.new_in(batch))


def save_is_due(state: TrainingState, monitor: RunMonitor, last_save: float) -> bool:
    """Whether the step being made is to be saved, by number of steps, epochs, minutes, or the kNN measured after it.

    Clocks differ between processes: if it is time on one, all save.
    """
    rules, step = state.recipe.checkpoint, state.step + 1
    periods = (rules.every_steps, rules.keep_every_epochs * state.steps_per_epoch)
    due = any(period and step % period == 0 for period in periods)
    if state.recipe.guard.policy == "skip":
        due |= is_rewind_point(state.recipe, state.steps_per_epoch, step)
    due |= bool(rules.keep_best) and monitor.knn_is_due(step)
    return due or bool(rules.every_minutes and time.monotonic() - last_save > 60 * rules.every_minutes)


def refuse_step(state: TrainingState, run: RunServices, guard: Guard, result: StepResult) -> None:
    """Write a crash dump of a bad step, and skip it, rewind or stop, as ``[guard]`` says."""
    state.optimizer.zero_grad()
    numbers = result.problem, result.loss, result.grad_norm
    crash_dump = try_to_write_crash_dump(state, run.folder, result.step, *numbers)
    run.logger.log_message(guard.refuse(result.step, result.problem, crash_dump))


def log_step(state: TrainingState, logger: RunLogger, meter: ThroughputMeter, result: StepResult) -> None:
    """Write a line of metrics.jsonl and the progress line, every ``[train] log_every`` steps and after each epoch."""
    train, step = state.recipe.train, state.step
    epoch_ends = step % state.steps_per_epoch == 0 or step == state.last_step
    if not (step % train.log_every == 0 or epoch_ends or result.skipped):
        return
    metrics = {name: float(mean_over_processes(value)) for name, value in result.metrics.items()}
    updated = {"skipped": 1.0} if result.skipped else result.updated
    scheduled = {"lr": result.lr}
    if state.recipe.schedule.weight_decay_end is not None:
        scheduled["weight_decay"] = result.weight_decay
    fields = {"loss": result.loss, **scheduled, "grad_norm": result.grad_norm, **updated, **metrics}
    epoch = step / state.steps_per_epoch
    rate, waiting = meter.read()
    speed = {"images_per_second": rate, "data_wait": waiting}
    logger.log_metrics({"step": step, "epoch": round(epoch, 6), **fields, **speed, **result.layer_gradients})
    seconds_left = (state.last_step - step) * train.batch_size / max(rate, 1e-9)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in fields.items())
    logger.show_progress(
        f"epoch {epoch:.2f}/{train.epochs}  {shown}  {rate:.0f} img/s  waiting for data {waiting:.0%}  "
        f"ETA {format_duration(seconds_left)}"
    )


def save_checkpoint(state: TrainingState, saver: Saver, *, wait: bool) -> None:
    """Hand the state to the saver, which writes it on the first process while training continues.

    Raises:
        SaveError: ``wait`` was asked for and the checkpoint could not be written; on all processes.
    """
    broadcast_buffers(state.method.encoder)
    mark_rewind_point(state)
    scaler = state.accelerator.scaler
    fields = {
        "scaler": scaler.state_dict() if scaler is not None else {},
        "course": state.recovery.as_json(),
        "recipe": state.recipe.as_tables(),
        "images": recorded_names_digest(saver.folder),
    }
    saver.save(state.step, state.method, state.optimizer.optimizer, fields)
    if wait:
        failure = saver.wait()
        failed = torch.tensor(float(bool(failure)), device=state.accelerator.device)
        if max_over_processes(failed) > 0:
            raise SaveError(f"{failure or 'the first process could not save'}; the same command tries again from there")


def mark_rewind_point(state: TrainingState) -> None:
    """Note in the recovery state that the run can go back to the checkpoint about to be saved, if it can.

    A run that stops at bad steps never goes back. Each of its checkpoints counts as a rewind point all the same, in
    case it is continued with ``policy = "skip"``.
    """
    recipe, recovery = state.recipe, state.recovery
    is_point = is_rewind_point(recipe, state.steps_per_epoch, state.step)
    if recipe.guard.policy == "stop" or (not recovery.skipped and is_point):
        recovery.back_to = state.step
