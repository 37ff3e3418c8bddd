"""One training step: from a batch to updated weights, teacher and queue.

A CPU hears at once whether a step was good, and updates nothing if it was not. A GPU is not waited for: the update is
handed to it together with a gate that it computes itself, and the step's numbers are read some steps later
(`TrainingState.lag`). See `sslkit.engine.steps_in_flight` for what happens then to a bad step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sslkit.data.augment.gpu import finish_on
from sslkit.data.batch import Batch
from sslkit.distributed.collectives import mean_with_due, upload
from sslkit.distributed.sharding import full_tensor
from sslkit.engine.gradient_cache import GlobalBatch, sliced_step, whole_batch_step
from sslkit.engine.optim import learning_rate, set_learning_rate, set_weight_decay, weight_decay
from sslkit.engine.resilience.guard import Guard
from sslkit.engine.runtime.step_numbers import StepNumbers
from sslkit.engine.state import TrainingState
from sslkit.methods import BatchInfo, Step
from sslkit.parts.updates.update_gate import gated
from sslkit.random_draws import DrawPurpose, draw_seed
from sslkit.recipe.resolve import Recipe

Poll = Callable[[], Sequence[bool]]


@dataclass
class StepInFlight:
    """A step that was given to the device, and whose numbers the host has not read."""

    step: int  # from 0
    batch: Batch  # this process's part, on the device, its views finished
    lr: float  # of the update, as is the weight decay
    weight_decay: float
    numbers: StepNumbers
    updated: dict[str, float] = field(default_factory=dict)  # what the method's ``after_update`` returned


@dataclass(frozen=True)
class StepResult:
    """What a training step did."""

    step: int  # from 0
    batch: Batch  # this process's part, on the device, its views finished
    loss: float  # of the global batch
    lr: float  # of the update, as is the weight decay
    weight_decay: float
    grad_norm: float  # over all trained parameters, before clipping
    layer_gradients: dict[str, float]  # norm of each layer; empty unless ``[monitor] layer_gradients`` is set
    metrics: dict[str, float]  # the method's scalars, the mean over processes
    problem: str  # why the step did not reach the weights; empty if it did
    skipped: bool  # nothing was updated, because of ``problem`` or an overflow that the gradient scaler found
    updated: dict[str, float]  # what the method's ``after_update`` returned
    flags: tuple[bool, ...]  # for each flag that was polled, whether any process raised it


def train_step(state: TrainingState, batch: Batch, guard: Guard, poll: Poll = lambda: ()) -> StepResult:
    """Compute the gradients of a batch and update weights, teacher and queue, unless the guard finds a problem.

    ``state`` is changed in place; ``state.step`` counts the step whether or not it reached the weights. ``poll`` is
    called after the backward pass; its flags are combined over all processes in the same all-reduce as the loss.
    """
    return finish_step(state, guard, start_step(state, batch, guard, poll))


def guard_of(state: TrainingState) -> Guard:
    """The guard of a run's steps."""
    scaled = state.accelerator.scaler is not None
    return Guard(state.recipe.guard, state.recovery, state.method, lag=state.lag, scaled=scaled)


def start_step(state: TrainingState, batch: Batch, guard: Guard, poll: Poll = lambda: ()) -> StepInFlight:
    """The part of `train_step` that does not wait for the device; with a ``state.lag`` this includes the update."""
    recipe, method, optimizer, step = state.recipe, state.method, state.optimizer, state.step
    optimizer.zero_grad()
    batch = finish_on(state.accelerator.device, batch, recipe.views)
    lr = learning_rate(recipe, step, state.steps_per_epoch) * state.recovery.lr_factor
    decay = weight_decay(recipe, state.progress)
    set_learning_rate(optimizer, lr)
    set_weight_decay(optimizer, decay)

    guard.snapshot(step)
    result = forward_and_backward(state, batch)
    scale = loss_scale(state)
    shared = average_numbers(result.loss, result.metrics, poll())
    prepare_gradients(state)
    grad_norm = clip_gradients(state)
    layers = layer_gradients(method.backbone) if recipe.monitor.layer_gradients else {}
    numbers = StepNumbers(shared, {"grad_norm": grad_norm, **scale}, layers)

    state.step += 1
    started = StepInFlight(step, batch, lr, decay, numbers)
    if state.lag:
        started.updated = update_under_gate(state, guard.allow(shared["loss"], grad_norm))
        numbers.start_download()
    return started


def finish_step(state: TrainingState, guard: Guard, started: StepInFlight) -> StepResult:
    """Read the numbers of a step, and update the weights if the device has not; a bad step is undone.

    A bad step on a GPU has no effect once `Guard.restore` was called, and the steps started after it have none either:
    they must be made again.
    """
    numbers, scaler = started.numbers.read(), state.accelerator.scaler
    loss, grad_norm = numbers.own["loss"], numbers.own["grad_norm"]
    problem = guard.problem(loss, grad_norm if scaler is None else None)  # a scaler expects some overflows
    overflow = scaler is not None and not math.isfinite(grad_norm)
    skipped = bool(problem) or overflow
    if skipped:
        guard.restore(started.step)
    if problem or (overflow and state.lag):  # else the optimizer deals with the overflow
        restore_loss_scale(state, numbers.own.get("scale"), overflow=overflow)
    if not problem:
        guard.accept(loss)
        if not state.lag:
            state.optimizer.step()
            started.updated = {} if overflow else state.method.after_update(state.progress)
    return StepResult(
        started.step,
        started.batch,
        loss,
        started.lr,
        started.weight_decay,
        grad_norm,
        numbers.layers,
        numbers.metrics,
        problem,
        skipped,
        {} if skipped else started.updated,
        numbers.flags,
    )


def update_under_gate(state: TrainingState, gate: Tensor) -> dict[str, float]:
    """Update weights, teacher and queue if ``gate``, a () tensor on the device, is 1; without waiting for it."""
    optimizer = state.optimizer.optimizer
    # What `torch.amp.GradScaler` tells fused optimizers: 1 if the update must be skipped.
    optimizer.found_inf, optimizer.grad_scale = 1.0 - gate, None
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale
    if state.accelerator.scaler is not None:
        state.accelerator.scaler.update()
    with gated(gate):
        return state.method.after_update(state.progress)


def forward_and_backward(state: TrainingState, batch: Batch) -> Step:
    """Loss and gradients of a global batch, in slices if ``[train] micro_batch`` asks for them."""
    recipe, accelerator, method = state.recipe, state.accelerator, state.method

    def seed_slice(index: int) -> None:
        key = (recipe.train.seed, DrawPurpose.DROPOUT, state.step, accelerator.process_index, index)
        seed_dropout(draw_seed(*key), accelerator.device)

    seed_slice(0)
    inputs = GlobalBatch(
        batch.views,
        BatchInfo(batch.sample_ids),
        state.progress,
        shuffle_order(recipe, state.step) if method.shuffle_keys else None,
        state.normalise,
    )
    if recipe.train.micro_batch:
        return sliced_step(accelerator, method, inputs, recipe.train.micro_batch, seed_slice)
    return whole_batch_step(accelerator, state.wrapped, inputs)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generators that a forward pass draws from; `torch.manual_seed` takes 2 ms while CUDA sleeps."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def shuffle_order(recipe: Recipe, step: int) -> NDArray[np.int64]:
    """The permutation of a global batch's keys (shuffling BN) at ``step``, the same on every process."""
    generator = np.random.default_rng([recipe.train.seed, DrawPurpose.SHUFFLE, step, 0, 0])
    return generator.permutation(recipe.train.batch_size)


def average_numbers(loss: Tensor, metrics: Mapping[str, Tensor], flags: Sequence[bool]) -> dict[str, Tensor]:
    """Means over processes in one all-reduce, by name: the loss, the metrics, and the flags as numbers."""
    raised = upload(torch.tensor([float(flag) for flag in flags], dtype=loss.dtype), loss.device)
    values = torch.cat([torch.stack([loss.detach(), *(each.detach().to(loss) for each in metrics.values())]), raised])
    names = ["loss", *(f"metric {name}" for name in metrics), *(f"flag {index}" for index in range(len(flags)))]
    return dict(zip(names, mean_with_due(values).unbind(), strict=True))


def loss_scale(state: TrainingState) -> dict[str, Tensor]:
    """The scale of the loss that a gradient scaler applied; nothing without one."""
    scaler = state.accelerator.scaler
    return {} if scaler is None else {"scale": scaler.scale(torch.ones((), device=state.accelerator.device))}


def restore_loss_scale(state: TrainingState, scale: float | None, *, overflow: bool) -> None:
    """Set the gradient scaler to what it is after a bad step whose ``scale`` this was; later steps are made again."""
    scaler = state.accelerator.scaler
    if scaler is None or scale is None:
        return
    if state.lag:
        scale *= scaler.get_backoff_factor() if overflow else 1.0
        scaler.load_state_dict({**scaler.state_dict(), "scale": scale, "_growth_tracker": 0})
    else:
        scaler.update(scale)  # it would refuse to unscale the next gradients


def prepare_gradients(state: TrainingState) -> None:
    """Let the method change its gradients; during ``[train] head_warmup_epochs`` drop those of the backbone."""
    state.method.before_update(state.progress)
    if state.step < state.recipe.train.head_warmup_epochs * state.steps_per_epoch:
        state.method.backbone.zero_grad()  # an optimizer leaves a parameter without gradient alone, decay included


def clip_gradients(state: TrainingState) -> Tensor:
    """Clip the gradients to ``[train] clip_norm``, if it is set; returns their norm before clipping, a () tensor.

    With a gradient scaler the gradients are divided by its scale first.
    """
    clip_norm = state.recipe.train.clip_norm
    if clip_norm:
        return full_tensor(state.accelerator.clip_grad_norm_(state.wrapped.parameters(), clip_norm))
    if state.accelerator.scaler is not None:
        state.accelerator.unscale_gradients()
    grads = [param.grad for param in state.method.parameters() if param.grad is not None]
    return full_tensor(torch.nn.utils.get_total_norm(grads))


def layer_gradients(backbone: nn.Module) -> dict[str, Tensor]:
    """Gradient norm of each layer, a () tensor, in the order of the forward pass, as ``gradient/blocks.3``.

    A layer is a child of the backbone, or an element of a child that is a list. A class token and the like come last.
    """
    squares: dict[str, Tensor] = {}
    for name, param in sorted(backbone.named_parameters(), key=lambda named: "." not in named[0]):
        if param.grad is not None:
            first, *rest = name.split(".")
            layer = f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first
            squares[layer] = squares.get(layer, param.new_zeros(())) + param.grad.float().square().sum()
    return {f"gradient/{layer}": full_tensor(square.sqrt()) for layer, square in squares.items()}
