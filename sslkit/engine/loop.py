"""The training loop, to be read from top to bottom."""

import time
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn

from sslkit.data.augment.cpu import normalise
from sslkit.data.augment.gpu import finish_on
from sslkit.data.loading.loader import Batch
from sslkit.distributed.collectives import copy_buffers_from_first, max_over_processes, mean_over_processes
from sslkit.distributed.consistency import compare_weights
from sslkit.distributed.heartbeat import Heartbeat
from sslkit.distributed.sharding import whole
from sslkit.engine.checkpoint.writer import SaveError, Saver
from sslkit.engine.logging.logger import Journal
from sslkit.engine.logging.throughput import StepClock
from sslkit.engine.monitor.evaluations import epoch_ends, measure, measure_what_is_owed, monitor_is_due, report
from sslkit.engine.monitor.knn_monitor import layer_gradients
from sslkit.engine.optim import learning_rate, set_learning_rate
from sslkit.engine.resilience.crash_dump import try_to_write_capsule
from sslkit.engine.resilience.guard import Guard, RunningStatistics
from sslkit.engine.resilience.preemption import StopRequest
from sslkit.engine.resilience.rewind import is_rewind_point
from sslkit.engine.rng import DROPOUT, draw_key, seed_dropout, shuffle_order
from sslkit.engine.state import Training
from sslkit.engine.step import GlobalBatch, sliced_step, whole_batch_step
from sslkit.methods import BatchInfo, Method, Progress, Step
from sslkit.recipe.resolve import Recipe


def run_loop(
    training: Training, journal: Journal, saver: Saver, stop: StopRequest, heart: Heartbeat
) -> tuple[int, str]:
    """Train from ``start_step`` to ``last_step``, or until asked to stop.

    Returns:
        Updates made, and why it stopped before its end; empty if it did not.

    Raises:
        BadStepError: A loss or gradient was bad, and nothing in ``[guard]`` helped.
    """
    recipe, method = training.recipe, training.method
    guard, statistics = Guard(recipe.guard, training.course), RunningStatistics(method, recipe.guard)
    clock, last_save = StepClock(recipe.train.batch_size), time.monotonic()
    heart.at(training.start_step, "evaluating")
    measure_what_is_owed(training, journal)
    method.train()
    heart.at(training.start_step, "starting")
    for step, batch in enumerate(clock.waiting(training.loader), start=training.start_step):
        heart.at(step, "in forward and backward")
        batch = finish_on(training.accelerator.device, batch, recipe.views)
        lr = learning_rate(recipe, step, training.steps_per_epoch) * training.course.lr_factor
        set_learning_rate(training.optimizer, lr)
        statistics.remember()
        result = forward_and_backward(
            recipe, training.accelerator, method, training.wrapped, batch, progress(training, step)
        )
        save_here, bad_here = save_is_due(training, step + 1, last_save), training.bad_samples.new_in(batch)
        loss, save_asked, stop_asked, bad_images = vote(result.loss, save_here, bool(stop.reason), bool(bad_here))
        if bad_images:
            training.bad_samples.collect(batch, step // training.steps_per_epoch, step + 1)
        numbers, layers = learn(training, journal, guard, statistics, step, loss)
        clock.finish_step()

        done, ends = step + 1, step + 1 == training.last_step
        heart.at(done, "in bookkeeping")
        if done % recipe.train.log_every == 0 or epoch_ends(training, done) or "skipped" in numbers:
            fields = {"loss": loss, "lr": lr, **numbers, **over_processes(result.metrics)}
            report(training, journal, clock, done, fields, layers)
        if recipe.guard.compare_every and done % recipe.guard.compare_every == 0:
            compare_weights(method, done, training.accelerator.device)
        if training.diagnostics and "skipped" not in numbers:
            training.diagnostics.see(done, numbers["grad_norm"], layers)
        heart.at(done, "evaluating")
        measures = monitor_is_due(training, done) and (ends or not stop_asked)
        measure(training, journal, batch, done, with_knn=measures)
        last = ends or bool(stop_asked)
        saves = last or (save_asked and not training.course.skipped)
        if saves:
            heart.at(done, "saving")
            save(training, saver, done, wait=last)
            last_save = time.monotonic()
        if stop_asked and not ends:
            return done, stop.reason or "a signal to another process"
        if measures or saves:
            clock.restart()
        heart.at(done, "waiting for data")
    return training.last_step, ""


def forward_and_backward(
    recipe: Recipe, accelerator: Accelerator, method: Method, wrapped: nn.Module, batch: Batch, position: Progress
) -> Step:
    """Loss and gradients of a global batch, in slices if the recipe asks for them."""
    step = position.updates

    def seed_slice(index: int) -> None:
        key = draw_key(recipe.train.seed, DROPOUT, step, accelerator.process_index, index)
        seed_dropout(key, accelerator.device)

    seed_slice(0)
    here = GlobalBatch(
        batch.views,
        BatchInfo(batch.sample_ids),
        position,
        shuffle_order(recipe, step) if method.shuffle_keys else None,
        partial(normalise, mean=recipe.views.mean, std=recipe.views.std),
    )
    if recipe.train.micro_batch:
        return sliced_step(accelerator, method, here, recipe.train.micro_batch, seed_slice)
    return whole_batch_step(accelerator, wrapped, here)


def vote(loss: torch.Tensor, *flags: bool) -> tuple[float, ...]:
    """The mean loss, and of each flag whether any process raised it: one word with the others, not three."""
    return tuple(mean_over_processes(torch.stack([loss.detach(), *map(loss.new_tensor, map(float, flags))])).tolist())


def over_processes(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    """The mean of each number over the processes."""
    return {name: float(mean_over_processes(value)) for name, value in metrics.items()}


def prepare_gradients(training: Training, step: int) -> None:
    """What method and recipe do to gradients before the update."""
    recipe, method = training.recipe, training.method
    method.before_update(progress(training, step))
    if step < recipe.train.head_warmup_epochs * training.steps_per_epoch:
        rest(method.backbone)


def learn(
    training: Training, journal: Journal, guard: Guard, statistics: RunningStatistics, step: int, loss: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Move weights, teacher and queue by the step's gradients, unless ``[guard]`` finds something bad in it.

    Returns:
        Numbers of the step, ``skipped`` among them if nothing moved, and the norm of each layer's gradient if asked.
    """
    recipe = training.recipe
    prepare_gradients(training, step)
    grad_norm = gradient_norm(training)
    layers = layer_gradients(training.method.backbone) if recipe.monitor.layer_gradients else {}
    # A gradient scaler finds overflows by itself, and expects some.
    complaint = guard.complaint(loss, grad_norm if training.accelerator.scaler is None else None)
    if complaint:
        statistics.put_back()
        refuse_step(training, journal, guard, step, complaint, loss, grad_norm)
        moved = {"skipped": 1.0}
    else:
        guard.accept(loss)
        moved = update(training, step)
    training.optimizer.zero_grad()
    return {"grad_norm": grad_norm, **moved}, layers


def refuse_step(
    training: Training, journal: Journal, guard: Guard, step: int, complaint: str, loss: float, grad_norm: float
) -> None:
    """Keep a bad step in a capsule, and go on without it, back or out as ``[guard]`` says."""
    training.optimizer.zero_grad()
    capsule = try_to_write_capsule(training, step, complaint, loss, grad_norm)
    journal.say(guard.refuse(step, complaint, capsule))


def update(training: Training, step: int) -> dict[str, float]:
    """Optimizer, then teacher and queue; none of them where a gradient scaler found an overflow."""
    training.optimizer.step()
    if training.accelerator.scaler is not None and training.optimizer.step_was_skipped:
        return {"skipped": 1.0}
    return training.method.after_update(progress(training, step + 1))


def progress(training: Training, updates: int) -> Progress:
    """Where in the whole training ``updates`` updates are."""
    train, steps = training.recipe.train, training.steps_per_epoch
    return Progress(updates, train.epochs * steps, steps, train.batch_size)


def rest(backbone: nn.Module) -> None:
    """Drop the backbone's gradients: optimizers leave alone, decay and all, what has none."""
    for param in backbone.parameters():
        param.grad = None


def gradient_norm(training: Training) -> float:
    """Norm of the gradient over all trained parameters, before it is clipped to ``[train] clip_norm``, if asked."""
    clip_norm = training.recipe.train.clip_norm
    if clip_norm:
        return float(whole(training.accelerator.clip_grad_norm_(training.wrapped.parameters(), clip_norm)))
    grads = [param.grad for param in training.method.parameters() if param.grad is not None]
    return float(whole(torch.nn.utils.get_total_norm(grads)))


def save_is_due(training: Training, done: int, last_save: float) -> bool:
    """Every so many steps, epochs, measurements or minutes, and at rewind points, where there may be a need of them.

    Clocks differ: if one process finds it time, all save.
    """
    rules = training.recipe.checkpoint
    kept_steps = rules.keep_every_epochs * training.steps_per_epoch
    by_steps = any(every and done % every == 0 for every in (rules.every_steps, kept_steps))
    if training.recipe.guard.policy == "skip":
        by_steps |= is_rewind_point(training.recipe, training.steps_per_epoch, done)
    measured = bool(rules.keep_best) and monitor_is_due(training, done)
    return by_steps or measured or bool(rules.every_minutes and time.monotonic() - last_save > 60 * rules.every_minutes)


def mark_rewind_point(training: Training, done: int) -> None:
    """Note in the counters that the run can go back to what is saved now, if so.

    A run that stops at bad steps never goes back. Each of its checkpoints is a point all the same, for the case that it
    is continued with ``policy = "skip"``.
    """
    recipe, course = training.recipe, training.course
    if recipe.guard.policy == "stop" or (
        not course.skipped and is_rewind_point(recipe, training.steps_per_epoch, done)
    ):
        course.back_to = done


def save(training: Training, saver: Saver, done: int, *, wait: bool) -> None:
    """Hand the state to the saver, which writes it on the first process while training goes on.

    Args:
        training: What is saved.
        saver: Writes it.
        done: Updates made.
        wait: Until it is on the disk, whole; on all processes.

    Raises:
        SaveError: ``wait`` was asked for and it could not be written; on all processes.
    """
    copy_buffers_from_first(training.method.encoder)
    mark_rewind_point(training, done)
    scaler = training.accelerator.scaler
    state = {
        "scaler": scaler.state_dict() if scaler is not None else {},
        "course": training.course.as_json(),
        "recipe": training.recipe.as_tables(),
    }
    saver.save(done, training.method, training.optimizer.optimizer, state)
    if wait:
        failure = saver.wait()
        failed = torch.tensor(float(bool(failure)), device=training.accelerator.device)
        if max_over_processes(failed) > 0:
            raise SaveError(f"{failure or 'the first process could not save'}; the same command tries again from there")
