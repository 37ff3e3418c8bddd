"""The state of training: what a step reads and changes, and what a run must remember to recover from bad steps."""

from collections import deque
from dataclasses import dataclass, field

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from pydantic import Field, field_validator
from torch import nn

from sslkit.data.augment.cpu import Normaliser
from sslkit.data.order.sampler import GlobalBatchSampler
from sslkit.data.sources.image_source import ImageSource
from sslkit.files.json_reader import StrictModel
from sslkit.methods import Method, Progress
from sslkit.recipe.resolve import Recipe

MAX_COUNT, MAX_STEP = 1_000_000, 2**53  # no run has more; a checkpoint that says so is refused
LOSS_WINDOW = 50  # losses of good steps that are kept to recognise a spike


class RecoveryState(StrictModel):
    """What a run must remember of its bad steps to continue exactly; the ``course`` of every checkpoint's state.json.

    A checkpoint of an older version lacks some fields; they get their defaults.
    """

    skipped: int = Field(default=0, ge=0, le=MAX_COUNT)  # consecutive bad steps up to now
    rewinds: int = Field(default=0, ge=0, le=MAX_COUNT)  # each takes the images in another order
    lr_factor: float = Field(default=1.0, gt=0, le=1)  # what the rewinds multiplied the learning rate by
    # Step of the checkpoint that a rewind would go back to; 0 is the start of the run, None means that there is none.
    back_to: int | None = Field(default=0, ge=0, lt=MAX_STEP)
    losses: deque[float] = Field(default_factory=deque, validate_default=True, strict=False)  # of good steps

    @field_validator("losses", mode="after")
    @classmethod
    def _bound(cls, losses: deque[float]) -> deque[float]:
        return deque(losses, LOSS_WINDOW)


@dataclass
class TrainingState:
    """What a training step reads and changes; made by `sslkit.engine.setup.set_up_training`."""

    recipe: Recipe
    accelerator: Accelerator
    source: ImageSource
    method: Method  # student, teacher and queue
    wrapped: nn.Module  # the method as Accelerate wraps it (DistributedDataParallel); called for the loss
    optimizer: AcceleratedOptimizer
    steps_per_epoch: int  # whole global batches in the images
    step: int  # steps made so far
    recovery: RecoveryState
    lag: int = 0  # number of steps that are started before the numbers of one are read; a GPU is not waited for
    normalise: Normaliser = field(init=False)  # of views on the device, by ``[views] mean`` and ``std``

    def __post_init__(self) -> None:
        self.normalise = Normaliser(self.recipe.views.mean, self.recipe.views.std)

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
