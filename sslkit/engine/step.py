"""One training step: from a batch to updated weights, teacher and queue."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sslkit.data.augment.gpu import finish_on
from sslkit.data.batch import Batch
from sslkit.distributed.collectives import mean_over_processes
from sslkit.distributed.sharding import full_tensor
from sslkit.engine.gradient_cache import GlobalBatch, sliced_step, whole_batch_step
from sslkit.engine.optim import learning_rate, set_learning_rate, set_weight_decay, weight_decay
from sslkit.engine.resilience.guard import Guard
from sslkit.engine.state import TrainingState
from sslkit.methods import BatchInfo, Step
from sslkit.random_draws import DrawPurpose, draw_seed
from sslkit.recipe.resolve import Recipe


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
    metrics: dict[str, Tensor]  # the method's scalars, of this process
    problem: str  # why the step did not reach the weights; empty if it did
    skipped: bool  # nothing was updated, because of ``problem`` or an overflow that the gradient scaler found
    updated: dict[str, float]  # what the method's ``after_update`` returned
    flags: tuple[bool, ...]  # for each flag that was polled, whether any process raised it


def train_step(
    state: TrainingState, batch: Batch, guard: Guard, poll: Callable[[], Sequence[bool]] = lambda: ()
) -> StepResult:
    """Compute the gradients of a batch and update weights, teacher and queue, unless the guard finds a problem.

    ``state`` is changed in place; ``state.step`` counts the step whether or not it reached the weights. ``poll`` is
    called after the backward pass; its flags are combined over all processes in the same all-reduce as the loss.
    """
    recipe, method, optimizer, step = state.recipe, state.method, state.optimizer, state.step
    optimizer.zero_grad()
    batch = finish_on(state.accelerator.device, batch, recipe.views)
    lr = learning_rate(recipe, step, state.steps_per_epoch) * state.recovery.lr_factor
    decay = weight_decay(recipe, state.progress)
    set_learning_rate(optimizer, lr)
    set_weight_decay(optimizer, decay)

    guard.snapshot()
    result = forward_and_backward(state, batch)
    loss, flags = reduce_step_flags(result.loss, poll())
    prepare_gradients(state)
    grad_norm = clip_gradients(state)
    layers = layer_gradients(method.backbone) if recipe.monitor.layer_gradients else {}

    scaler = state.accelerator.scaler  # finds overflows itself, and expects some
    problem = guard.problem(loss, grad_norm if scaler is None else None)
    skipped, updated = bool(problem), {}
    state.step += 1
    if problem:
        guard.restore()
    else:
        guard.accept(loss)
        optimizer.step()
        skipped = scaler is not None and optimizer.step_was_skipped
        if not skipped:
            updated = method.after_update(state.progress)
    return StepResult(step, batch, loss, lr, decay, grad_norm, layers, result.metrics, problem, skipped, updated, flags)


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


def reduce_step_flags(loss: Tensor, flags: Sequence[bool]) -> tuple[float, tuple[bool, ...]]:
    """The mean loss over processes, and for each flag whether any process raised it, in one all-reduce."""
    values = torch.stack([loss.detach(), *(loss.new_tensor(float(flag)) for flag in flags)])
    mean_loss, *raised = mean_over_processes(values).tolist()
    return mean_loss, tuple(share > 0 for share in raised)


def prepare_gradients(state: TrainingState) -> None:
    """Let the method change its gradients; during ``[train] head_warmup_epochs`` drop those of the backbone."""
    state.method.before_update(state.progress)
    if state.step < state.recipe.train.head_warmup_epochs * state.steps_per_epoch:
        state.method.backbone.zero_grad()  # an optimizer leaves a parameter without gradient alone, decay included


def clip_gradients(state: TrainingState) -> float:
    """Clip the gradients to ``[train] clip_norm``, if it is set; returns their norm before clipping."""
    clip_norm = state.recipe.train.clip_norm
    if clip_norm:
        return float(full_tensor(state.accelerator.clip_grad_norm_(state.wrapped.parameters(), clip_norm)))
    grads = [param.grad for param in state.method.parameters() if param.grad is not None]
    return float(full_tensor(torch.nn.utils.get_total_norm(grads)))


def layer_gradients(backbone: nn.Module) -> dict[str, float]:
    """Gradient norm of each layer in the order of the forward pass, as ``gradient/blocks.3``.

    A layer is a child of the backbone, or an element of a child that is a list. A class token and the like come last.
    """
    squares: dict[str, Tensor] = {}
    for name, param in sorted(backbone.named_parameters(), key=lambda named: "." not in named[0]):
        if param.grad is not None:
            first, *rest = name.split(".")
            layer = f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first
            squares[layer] = squares.get(layer, param.new_zeros(())) + param.grad.float().square().sum()
    return {f"gradient/{layer}": float(square.sqrt()) for layer, square in squares.items()}
