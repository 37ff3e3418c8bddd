"""The checkpoint that a run goes back to after too many consecutive bad steps.

Rewind points depend on the step number alone. Checkpoints that a signal or a timer causes serve to resume only: a run
that was stopped and resumed then rewinds to the same step as one that nobody stopped, and ends with the same bits.
"""

from pathlib import Path

import torch
from torch import Tensor

from sslkit.distributed.sharding import shard_like
from sslkit.engine.checkpoint.format import Checkpoint, read_checkpoint
from sslkit.engine.checkpoint.retention import checkpoint_name, saved_steps
from sslkit.engine.optim import init_momentum_buffers
from sslkit.engine.state import RecoveryState, TrainingState
from sslkit.errors import UserError
from sslkit.methods import Method
from sslkit.recipe.resolve import Recipe

DEFAULT_PERIOD = 1000  # steps between rewind points if [checkpoint] every_steps is 0


def is_rewind_point(recipe: Recipe, steps_per_epoch: int, step: int) -> bool:
    """Whether a run with ``[guard] policy = "skip"`` can go back to its state after ``step`` steps."""
    rules = recipe.checkpoint
    epochs = (rules.keep_every_epochs, (recipe.monitor.every_epochs or 0) if rules.keep_best else 0)
    periods = (rules.every_steps or DEFAULT_PERIOD, *(each * steps_per_epoch for each in epochs))
    return any(every and step % every == 0 for every in periods)


def recovery_state_of(checkpoint: Checkpoint | None, folder: Path) -> RecoveryState:
    """The recovery state of the checkpoint that a run continues from; the default state if the run starts.

    The run can go back only to checkpoints in its own folder, as its next start would not find others.
    """
    if checkpoint is None:
        return RecoveryState()
    fields = checkpoint.state.get("course", {})
    recovery = RecoveryState(**fields)
    saved = saved_steps(folder / "checkpoints")
    if checkpoint.step not in saved:
        recovery.back_to = None
    elif "back_to" not in fields or (recovery.back_to and recovery.back_to not in saved):
        recovery.back_to = checkpoint.step  # saved by an older version, or under another policy
    return recovery


def rewind_checkpoint(folder: Path, recovery: RecoveryState) -> Checkpoint | None:
    """Read the newest intact rewind point of a run folder; None if there is none."""
    for step in sorted(saved_steps(folder / "checkpoints"), reverse=True):
        if step > (recovery.back_to or 0):
            continue
        try:
            checkpoint = read_checkpoint(folder / "checkpoints" / checkpoint_name(step))
        except UserError:
            continue
        if step in (recovery.back_to, checkpoint.state.get("course", {}).get("back_to")):
            return checkpoint
    return None


def reset_training(state: TrainingState, method: Method) -> None:
    """Reset weights, optimizer and loss scale to those of the start of a run; ``method`` is built with its seed."""
    held = state.method.state_dict()
    fresh = {name: shard_like(held[name], value) for name, value in method.state_dict().items()}
    state.method.load_state_dict(fresh)
    optimizer = state.optimizer.optimizer
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for key in [key for key, value in group.items() if isinstance(value, Tensor)]:  # timm's LAMB counts steps there
            del group[key]
    init_momentum_buffers(optimizer)
    if (scaler := state.accelerator.scaler) is not None:
        scaler.load_state_dict(torch.amp.GradScaler(state.accelerator.device.type).state_dict())
