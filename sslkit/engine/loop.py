"""The training loop, to be read from top to bottom. `sslkit.engine.step` is one step of it."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sslkit.data.batch import Batch
from sslkit.distributed.collectives import broadcast_buffers, max_over_processes
from sslkit.distributed.consistency import compare_weights
from sslkit.distributed.heartbeat import Heartbeat
from sslkit.engine.checkpoint.writer import SaveError, Saver
from sslkit.engine.cost.device_meter import make_device_meter
from sslkit.engine.logging.logger import RunLogger
from sslkit.engine.logging.progress_line import progress_line
from sslkit.engine.logging.throughput import ThroughputMeter
from sslkit.engine.monitor.evaluations import RunMonitor
from sslkit.engine.resilience.crash_dump import try_to_write_crash_dump
from sslkit.engine.resilience.guard import Guard
from sslkit.engine.resilience.preemption import EVALUATION, STEP, StopRequest
from sslkit.engine.resilience.rewind import is_rewind_point
from sslkit.engine.run_folder.dataset_identity import BadSamples, recorded_names_digest
from sslkit.engine.runtime.garbage import collect_garbage, collected_between_steps
from sslkit.engine.setup import make_train_loader
from sslkit.engine.state import TrainingState
from sslkit.engine.step import StepResult, guard_of
from sslkit.engine.steps_in_flight import StepsInFlight


@dataclass(frozen=True)
class RunServices:
    """What the loop reports to and takes orders from."""

    folder: Path  # of the run
    logger: RunLogger  # metrics, messages and trackers
    saver: Saver  # writes checkpoints
    monitor: RunMonitor  # kNN and diagnostics
    bad_samples: BadSamples  # the images that cannot be read
    stop: StopRequest  # signals and the time limit
    heartbeat: Heartbeat  # tells the other processes what this one does


@collected_between_steps()
def run_loop(state: TrainingState, run: RunServices) -> str:
    """Train from ``state.step`` to the last step; returns why training stopped before it, or an empty string.

    Raises:
        BadStepError: The loss or the gradient of a step was bad, and ``[guard]`` says to stop.
        RewindError: There were too many consecutive bad steps; see `sslkit.engine.resilience.rewind`.
    """
    guard = guard_of(state)
    run.heartbeat.at(state.step, "evaluating")
    run.monitor.resume()
    state.method.train()
    run.heartbeat.at(state.step, "starting")
    run.stop.finishing = STEP
    meter = ThroughputMeter(state.recipe.train.batch_size, make_device_meter(state))
    asked = Asked()
    steps = StepsInFlight(state, guard, partial(poll_flags, run), partial(report_step, state, run, guard, meter, asked))
    for batch in meter.timed(make_train_loader(state)):
        run.heartbeat.at(state.step, "in forward and backward")
        steps.start(batch)
        run.heartbeat.at(state.step, "in bookkeeping")
        steps.finish(all_steps=is_due(state, run))
        if asked.to_save or asked.to_stop:
            steps.finish(all_steps=True)
        if (period := state.recipe.guard.compare_every) and state.step % period == 0:
            compare_weights(state.method, state.step, state.accelerator.device)

        run.heartbeat.at(state.step, "evaluating")
        run.stop.finishing = EVALUATION
        ends = state.step == state.last_step
        evaluated = run.monitor.after_step(steps.last_views, stops=asked.to_stop and not ends)
        run.stop.finishing = STEP

        to_save = asked.to_save or save_is_due(state, run)
        saves = ends or asked.to_stop or (to_save and not state.recovery.skipped)
        if saves:
            run.heartbeat.at(state.step, "saving")
            save_checkpoint(state, run.saver, wait=ends or asked.to_stop)
        if asked.to_stop and not ends:
            return run.stop.reason or "a signal to another process"
        asked.to_save = False
        if evaluated or saves:
            meter.restart()
        collect_garbage(state.step, paused=evaluated or saves)
        run.heartbeat.at(state.step, "waiting for data")
    return ""


@dataclass
class Asked:
    """What any process has asked all processes to do."""

    to_save: bool = False
    to_stop: bool = False


def poll_flags(run: RunServices, batch: Batch) -> tuple[bool, bool, bool]:
    """What this process asks all processes to do after a step: save, stop, exchange unreadable images.

    Minutes are up on any process, as clocks differ.
    """
    minutes = run.saver.recipe.checkpoint.every_minutes
    saves = bool(minutes) and time.monotonic() - run.saver.saved_at > 60 * minutes
    return saves, bool(run.stop.reason), bool(run.bad_samples.new_in(batch))


def save_is_due(state: TrainingState, run: RunServices) -> bool:
    """Whether to save after ``state.step`` steps: by number of steps or epochs, or for the kNN of a step."""
    rules, step = state.recipe.checkpoint, state.step
    periods = (rules.every_steps, rules.keep_every_epochs * state.steps_per_epoch)
    return (
        any(period and step % period == 0 for period in periods)
        or (state.recipe.guard.policy == "skip" and is_rewind_point(state.recipe, state.steps_per_epoch, step))
        or (bool(rules.keep_best) and run.monitor.knn_is_due(step))
    )


def is_due(state: TrainingState, run: RunServices) -> bool:
    """Whether anything follows ``state.step`` steps for which all of them must be finished."""
    period = state.recipe.guard.compare_every
    compares = bool(period) and state.step % period == 0
    return compares or state.step == state.last_step or save_is_due(state, run) or run.monitor.is_due(state.step)


def report_step(
    state: TrainingState, run: RunServices, guard: Guard, meter: ThroughputMeter, asked: Asked, result: StepResult
) -> None:
    """Deal with a finished step: bad images, a problem, metrics and progress."""
    to_save, to_stop, bad_images = result.flags
    asked.to_save, asked.to_stop = asked.to_save or to_save, asked.to_stop or to_stop
    if bad_images:
        run.bad_samples.collect(result.batch, result.step // state.steps_per_epoch, result.step + 1)
    if result.problem:
        refuse_step(state, run, guard, result)
    log_step(state, run.logger, meter, result)
    run.monitor.observe(result)


def refuse_step(state: TrainingState, run: RunServices, guard: Guard, result: StepResult) -> None:
    """Write a crash dump of a bad step, and skip it, rewind or stop, as ``[guard]`` says."""
    state.optimizer.zero_grad()
    numbers = result.problem, result.loss, result.grad_norm
    crash_dump = try_to_write_crash_dump(state, run.folder, result.step, *numbers)
    run.logger.log_message(guard.refuse(result.step, result.problem, crash_dump))


def log_step(state: TrainingState, logger: RunLogger, meter: ThroughputMeter, result: StepResult) -> None:
    """Show progress; every ``[train] log_every`` steps and after each epoch, also write a line of metrics.jsonl."""
    step = result.step + 1
    epoch_ends = step % state.steps_per_epoch == 0 or step == state.last_step
    if step % state.recipe.train.log_every == 0 or epoch_ends or result.skipped:
        write_metrics(state, logger, meter, result)
    logger.show_progress(progress_line(state, meter, result, logger.method_metrics))


def write_metrics(state: TrainingState, logger: RunLogger, meter: ThroughputMeter, result: StepResult) -> None:
    """Write a line of metrics.jsonl."""
    updated = {"skipped": 1.0} if result.skipped else result.updated
    scheduled = {"lr": result.lr}
    if state.recipe.schedule.weight_decay_end is not None:
        scheduled["weight_decay"] = result.weight_decay
    fields = {"loss": result.loss, **scheduled, "grad_norm": result.grad_norm, **updated, **result.metrics}
    position = {"step": result.step + 1, "epoch": round((result.step + 1) / state.steps_per_epoch, 6)}
    logger.log_metrics({**position, **fields, **meter.fields(), **result.layer_gradients})
    logger.method_metrics = result.metrics


def save_checkpoint(state: TrainingState, saver: Saver, *, wait: bool) -> None:
    """Hand the state to the saver, which writes it on the first process while training continues.

    With ``wait``, raise a SaveError on all processes if it could not be written.
    """
    broadcast_buffers(state.method.encoder)
    # The run can go back to this checkpoint. One that stops at bad steps never does, but marks its checkpoints all the
    # same, in case it is continued with ``policy = "skip"``.
    is_point = is_rewind_point(state.recipe, state.steps_per_epoch, state.step) and not state.recovery.skipped
    if is_point or state.recipe.guard.policy == "stop":
        state.recovery.back_to = state.step
    scaler = state.accelerator.scaler
    fields = {
        "scaler": scaler.state_dict() if scaler is not None else {},
        "course": state.recovery.model_dump(mode="json"),
        "recipe": state.recipe.as_tables(),
        "images": recorded_names_digest(saver.folder),
    }
    saver.save(state.step, state.method, state.optimizer.optimizer, fields)
    if wait:
        failure = saver.wait()
        failed = torch.tensor(float(bool(failure)), device=state.accelerator.device)
        if max_over_processes(failed) > 0:
            raise SaveError(f"{failure or 'the first process could not save'}; the same command tries again from there")
