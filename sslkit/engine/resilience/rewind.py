"""Where a run goes back to after too many bad steps.

Rewind points depend on the step number alone. What a signal or the clock saves besides is for resuming only: a run that
was stopped and resumed then goes back to the same step as one that nobody stopped, and ends with the same bits.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sslkit.distributed.sharding import in_parts_like
from sslkit.engine.checkpoint.format import Checkpoint, read_checkpoint
from sslkit.engine.checkpoint.retention import checkpoint_name, saved_steps
from sslkit.engine.optim import begin_momenta
from sslkit.engine.resilience.guard import Course
from sslkit.engine.state import Training
from sslkit.errors import UserError
from sslkit.methods import Method
from sslkit.recipe.resolve import Recipe

EVERY = 1000  # steps between rewind points where [checkpoint] every_steps is 0


def is_rewind_point(recipe: Recipe, steps_per_epoch: int, done: int) -> bool:
    """Whether ``[guard] policy = "skip"`` can go back to the state after ``done`` updates."""
    rules = recipe.checkpoint
    epochs = (rules.keep_every_epochs, recipe.monitor.every_epochs if rules.keep_best else 0)
    periods = (rules.every_steps or EVERY, *(each * steps_per_epoch for each in epochs))
    return any(every and done % every == 0 for every in periods)


def course_of(checkpoint: Checkpoint | None, folder: Path) -> Course:
    """The counters to start with, and which checkpoint of the run's own folder it can go back to.

    Args:
        checkpoint: What the run continues from, if anything.
        folder: Run folder. A checkpoint of another folder cannot be gone back to: the next start would not know it.
    """
    if checkpoint is None:
        return Course()
    fields = checkpoint.state.get("course", {})
    course = Course.from_json(fields)
    saved = saved_steps(folder / "checkpoints")
    if checkpoint.step not in saved:
        course.back_to = None
    elif "back_to" not in fields or (course.back_to and course.back_to not in saved):
        course.back_to = checkpoint.step  # saved by an older version, or with another policy
    return course


def rewind_checkpoint(folder: Path, course: Course) -> Checkpoint | None:
    """Read the newest whole rewind point of a run folder; None if there is none."""
    for step in sorted(saved_steps(folder / "checkpoints"), reverse=True):
        if step > (course.back_to or 0):
            continue
        try:
            checkpoint = read_checkpoint(folder / "checkpoints" / checkpoint_name(step))
        except UserError:
            continue
        if step in (course.back_to, checkpoint.state.get("course", {}).get("back_to")):
            return checkpoint
    return None


def start_again(training: Training, build: Callable[[Recipe, int], Method]) -> None:
    """Put weights, optimizer and loss scale back to what the run began with.

    Args:
        training: Changed in place.
        build: Makes the method from the recipe and the number of images; called with the seed that the run began with.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.recipe.train.seed)
        fresh = build(training.recipe, training.images).state_dict()
    held = training.method.state_dict()
    training.method.load_state_dict({name: in_parts_like(held[name], value) for name, value in fresh.items()})
    optimizer = training.optimizer.optimizer
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for key in [key for key, value in group.items() if isinstance(value, Tensor)]:  # timm's LAMB counts steps there
            del group[key]
    begin_momenta(optimizer)
    if (scaler := training.accelerator.scaler) is not None:
        scaler.load_state_dict(torch.amp.GradScaler(training.accelerator.device.type).state_dict())
