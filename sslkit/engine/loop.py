"""The training loop, to be read from top to bottom."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from sslkit.data.loader import Batch
from sslkit.data.views import normalise
from sslkit.engine.alarms import dip_alarm, leak_alarm, read_curve
from sslkit.engine.checkpoint import save_checkpoint
from sslkit.engine.diagnostics import Diagnostics
from sslkit.engine.journal import Journal, duration, read_lines
from sslkit.engine.monitors import KnnMonitor, layer_gradients
from sslkit.engine.optim import learning_rate, set_learning_rate
from sslkit.engine.step import GlobalBatch, sliced_step, whole_batch_step
from sslkit.errors import RunError, UserError
from sslkit.methods import Method, Progress, Step
from sslkit.parts.collectives import copy_buffers_from_first, mean_over_processes
from sslkit.publish.export import write_encoder
from sslkit.recipe import Recipe

SHUFFLE, DROPOUT = 1, 2  # what a draw is for, the second of five words of its key; views have 0


class NonFiniteError(RunError):
    """Loss or gradient is not a number; the weights are those of the last good step."""


@dataclass
class Training:
    """Everything the loop turns.

    Attributes:
        recipe: What was asked for.
        folder: Run folder.
        accelerator: Device, precision and processes.
        method: The method itself.
        wrapped: The method as Accelerate wraps it; called for the loss.
        optimizer: As Accelerate wraps it.
        loader: Batches from ``start_step`` on.
        steps_per_epoch: Whole global batches in the data.
        start_step: Updates made before this process started.
        last_step: Updates after which to stop.
        monitor: kNN on a labelled set, or None.
        diagnostics: What is watched without labels, or None.
    """

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    method: Method
    wrapped: nn.Module
    optimizer: AcceleratedOptimizer
    loader: "DataLoader[Batch]"
    steps_per_epoch: int
    start_step: int
    last_step: int
    monitor: KnnMonitor | None
    diagnostics: Diagnostics | None


def run_loop(training: Training, journal: Journal) -> None:
    """Train from ``start_step`` to ``last_step``."""
    recipe, accelerator, method = training.recipe, training.accelerator, training.method
    total_steps = recipe.train.epochs * training.steps_per_epoch
    clock, last_save = StepClock(recipe.train.batch_size), time.monotonic()
    method.train()
    for step, batch in enumerate(clock.waiting(training.loader), start=training.start_step):
        lr = learning_rate(recipe, step, training.steps_per_epoch)
        set_learning_rate(training.optimizer, lr)
        result = forward_and_backward(training, batch, step)
        late = float(save_is_due(training, step + 1, last_save))
        loss, save_votes = mean_over_processes(torch.stack([result.loss, result.loss.new_tensor(late)])).tolist()
        check_finite("loss", loss, step)
        method.before_update(Progress(step, total_steps, training.steps_per_epoch))
        if step < recipe.train.head_warmup_epochs * training.steps_per_epoch:
            rest(method.backbone)
        grad_norm = gradient_norm(training)
        layers = layer_gradients(method.backbone) if recipe.monitor.layer_gradients else {}
        if accelerator.scaler is None:  # with a scaler, an overflow is expected now and then and skips the step
            check_finite("gradient norm", grad_norm, step)
        training.optimizer.step()
        training.optimizer.zero_grad()
        moved = method.after_update(Progress(step + 1, total_steps, training.steps_per_epoch))
        clock.finish_step()

        done = step + 1
        epoch_ends = done % training.steps_per_epoch == 0 or done == training.last_step
        if done % recipe.train.log_every == 0 or epoch_ends:
            fields = {"loss": loss, "lr": lr, "grad_norm": grad_norm, **moved}
            fields |= {name: float(mean_over_processes(value)) for name, value in result.metrics.items()}
            report(training, journal, clock, done, fields, layers)
        measures = bool(training.monitor and epoch_ends and monitor_is_due(training, done))
        if measures:
            measure_knn(training, journal, done)
        if training.diagnostics:
            training.diagnostics.see(done, grad_norm, layers)
            diagnose(training, training.diagnostics, journal, batch, done, with_knn=measures)
        if measures:
            clock.restart()
        if done == training.last_step or save_votes > 0:
            save(training, done)
            last_save = time.monotonic()
            clock.restart()


def forward_and_backward(training: Training, batch: Batch, step: int) -> Step:
    """Loss and gradients of a global batch, in slices if the recipe asks for them."""
    recipe, accelerator = training.recipe, training.accelerator

    def seed_slice(index: int) -> None:
        key = draw_key(recipe.train.seed, DROPOUT, step, accelerator.process_index, index)
        seed_dropout(key, accelerator.device)

    seed_slice(0)
    here = GlobalBatch(
        [view.to(accelerator.device, non_blocking=True) for view in batch.views],
        batch.sample_ids.to(accelerator.device, non_blocking=True),
        shuffle_order(recipe, step) if training.method.shuffle_keys else None,
        partial(normalise, mean=recipe.views.mean, std=recipe.views.std),
    )
    if recipe.train.micro_batch:
        return sliced_step(accelerator, training.method, here, recipe.train.micro_batch, seed_slice)
    return whole_batch_step(accelerator, training.wrapped, here)


def rest(backbone: nn.Module) -> None:
    """Drop the backbone's gradients: optimizers leave alone, decay and all, what has none."""
    for param in backbone.parameters():
        param.grad = None


def check_finite(what: str, value: float, step: int) -> None:
    """Stop before the optimizer moves if ``value`` is not a number."""
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the {what} of step {step} is {value}; stopped before the weights moved. Usual cures: a lower [optim] lr, "
            "a longer [schedule] warmup_epochs, [train] precision = 'bf16' or 'no'"
        )


def gradient_norm(training: Training) -> float:
    """Norm of the gradient over all trained parameters, before it is clipped to ``[train] clip_norm``, if asked."""
    clip_norm = training.recipe.train.clip_norm
    if clip_norm:
        return float(training.accelerator.clip_grad_norm_(training.wrapped.parameters(), clip_norm))
    grads = [param.grad for param in training.method.parameters() if param.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads))


def draw_key(*words: int) -> int:
    """One 63-bit seed for a key of several words."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generators a forward pass draws from; torch.manual_seed takes 2 ms where CUDA sleeps."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def shuffle_order(recipe: Recipe, step: int) -> NDArray[np.int64]:
    """The permutation of a global batch's keys at ``step``, the same on every process."""
    generator = np.random.default_rng([recipe.train.seed, SHUFFLE, step, 0, 0])
    return generator.permutation(recipe.train.batch_size)


def report(
    training: Training,
    journal: Journal,
    clock: "StepClock",
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


def monitor_is_due(training: Training, done: int) -> bool:
    """Every so many whole epochs, and at the end."""
    every = training.recipe.monitor.every_epochs * training.steps_per_epoch
    return done % every == 0 or done == training.last_step


def measure_knn(training: Training, journal: Journal, done: int) -> None:
    """Score the backbone by kNN and write it down."""
    assert training.monitor is not None
    started = time.monotonic()
    accuracy = training.monitor(training.method.backbone)
    protocol = training.monitor.protocol
    epoch = done / training.steps_per_epoch
    journal.result(
        {
            "by": "monitor",
            "step": done,
            "epoch": epoch,
            "evaluation": f"knn k={protocol.k} temperature={protocol.temperature:g}",
            "data": training.monitor.pair.description,
            "accuracy": accuracy,
        }
    )
    journal.say(f"epoch {epoch:g}: kNN {accuracy:.2%} ({duration(time.monotonic() - started)})")


def diagnose(
    training: Training, diagnostics: Diagnostics, journal: Journal, batch: Batch, done: int, *, with_knn: bool
) -> None:
    """Write a line of diagnostics if one is due: of the batch, or of a fixed sample and the curves beside a kNN."""
    backbone = training.method.backbone
    if with_knn:
        fields = diagnostics.of_sample(backbone)
    elif diagnostics.is_due(done) or done == training.last_step:
        fields = diagnostics.of_batch(backbone, batch.views)
    else:
        return
    if not journal.active:
        return
    if with_knn and training.monitor:
        curve = read_curve(*(read_lines(journal.folder / name) for name in ("metrics.jsonl", "results.jsonl")))
        test_images = len(training.monitor.pair.test)
        fields["alarms"] += dip_alarm(curve, test_images) + leak_alarm(curve, test_images)
    journal.diagnosis({"step": done, "epoch": round(done / training.steps_per_epoch, 6), **fields})


def save_is_due(training: Training, done: int, last_save: float) -> bool:
    """Every so many steps or minutes. Clocks differ: if one process finds it is time, all save."""
    every = training.recipe.checkpoint
    by_steps = bool(every.every_steps) and done % every.every_steps == 0
    return by_steps or bool(every.every_minutes and time.monotonic() - last_save > 60.0 * every.every_minutes)


def save(training: Training, done: int) -> None:
    """Write a checkpoint and the encoder; the first process writes, the others wait."""
    copy_buffers_from_first(training.method.backbone)
    if training.accelerator.is_main_process:
        scaler = training.accelerator.scaler
        recipe = training.recipe
        save_checkpoint(
            training.folder / "checkpoints",
            done,
            training.method,
            training.optimizer.optimizer,
            scaler.state_dict() if scaler is not None else {},
            recipe.as_tables(),
            recipe.checkpoint.keep,
        )
        tag = f"{recipe.method_name}_e{done // training.steps_per_epoch}"
        write_encoder(recipe, training.method.backbone.state_dict(), training.folder / "encoder", tag, "apache-2.0")
    training.accelerator.wait_for_everyone()


class StepClock:
    """Images per second and the share of time spent waiting for data, since the last line of metrics."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Forget what was measured, so that evaluation and saving do not count."""
        self.started, self.waited, self.steps = time.monotonic(), 0.0, 0

    def waiting(self, loader: "DataLoader[Batch]") -> Iterator[Batch]:
        """The loader's batches, the wait for each on the clock."""
        batches = iter(loader)
        while True:
            asked = time.monotonic()
            try:
                batch = next(batches, None)
            except UserError as error:
                # A worker's error arrives with its traceback; its last line is the sentence.
                raise UserError(str(error).splitlines()[-1].split("UserError: ")[-1]) from None
            self.waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def finish_step(self) -> None:
        """Count a step."""
        self.steps += 1

    def window(self) -> tuple[float, float]:
        """Images per second and share of waiting since the last call; starts a new window."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        figures = self.steps * self.batch_size / seconds, self.waited / seconds
        self.restart()
        return figures
