"""The state of training: what a step reads and changes, and what a run must remember to recover from bad steps."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from sslkit.data.order.sampler import GlobalBatchSampler
from sslkit.data.sources.image_source import ImageSource
from sslkit.errors import UserError
from sslkit.files.jsonl_reader import number
from sslkit.methods import Method, Progress
from sslkit.recipe.resolve import Recipe

MAX_COUNT, MAX_STEP = 1_000_000, 2**53  # no run has more; a checkpoint that says so is refused
LOSS_WINDOW = 50  # losses of good steps that are kept to recognise a spike


@dataclass
class RecoveryState:
    """What a run must remember of its bad steps to continue exactly; the ``course`` of every checkpoint's state.json.

    Attributes:
        skipped: Consecutive bad steps up to now.
        rewinds: How often the run went back to a checkpoint. Each time it takes the images in another order.
        lr_factor: What the rewinds multiplied the learning rate by.
        losses: Losses of the latest good steps.
        back_to: Step of the checkpoint that a rewind would go back to: 0 is the start of the run, None means that
            there is none. See `sslkit.engine.resilience.rewind`.
    """

    skipped: int = 0
    rewinds: int = 0
    lr_factor: float = 1.0
    back_to: int | None = 0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=LOSS_WINDOW))

    def as_json(self) -> dict[str, Any]:
        """The fields as plain numbers."""
        return {**vars(self), "losses": list(self.losses)}

    @staticmethod
    def from_json(fields: Any) -> "RecoveryState":
        """Read what `as_json` returned; a field that an older version did not write gets its default.

        Raises:
            UserError: A field has a value that no run writes. The message continues one that names the file.
        """
        if not isinstance(fields, dict):
            raise UserError(f"course must be an object, not {fields!r:.50}")
        valid: dict[str, Callable[[Any], bool]] = {
            "skipped": _is_count,
            "rewinds": _is_count,
            "lr_factor": lambda value: 0 < (number(value) or 0) <= 1,
            "losses": lambda value: isinstance(value, list) and all(number(each) is not None for each in value),
            "back_to": lambda value: value is None or (type(value) is int and 0 <= value < MAX_STEP),
        }
        for name, value in fields.items():
            if name not in valid or not valid[name](value):
                raise UserError(f"course {name:.50} cannot be {value!r:.50}")
        return RecoveryState(**{**fields, "losses": deque(fields.get("losses", ()), maxlen=LOSS_WINDOW)})


@dataclass
class TrainingState:
    """What a training step reads and changes; made by `sslkit.engine.setup.set_up_training`.

    Attributes:
        recipe: The resolved recipe.
        accelerator: Device, precision and processes.
        source: The images to train on.
        method: Student, teacher and queue.
        wrapped: The method as Accelerate wraps it (DistributedDataParallel); called for the loss.
        optimizer: The optimizer as Accelerate wraps it.
        steps_per_epoch: Whole global batches in the images.
        step: Steps made so far.
        recovery: Bad steps and rewinds so far.
    """

    recipe: Recipe
    accelerator: Accelerator
    source: ImageSource
    method: Method
    wrapped: nn.Module
    optimizer: AcceleratedOptimizer
    steps_per_epoch: int
    step: int
    recovery: RecoveryState

    @property
    def last_step(self) -> int:
        """The number of steps after which training ends."""
        total = self.recipe.train.epochs * self.steps_per_epoch
        return min(self.recipe.train.max_steps or total, total)

    @property
    def progress(self) -> Progress:
        """The position in the whole schedule, as methods are told it."""
        train, steps = self.recipe.train, self.steps_per_epoch
        return Progress(self.step, train.epochs * steps, steps, train.batch_size)

    def batches(self, total_steps: int, *, rank: int = 0, world_size: int = 1) -> GlobalBatchSampler:
        """Which samples are in each batch from ``step`` to ``total_steps``, for one process of ``world_size``."""
        return GlobalBatchSampler(
            len(self.source),
            self.recipe.train.batch_size,
            self.recipe.train.seed,
            rank=rank,
            world_size=world_size,
            start_step=self.step,
            total_steps=total_steps,
            order_variant=self.recovery.rewinds,
            plan=self.source.plan,
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT
