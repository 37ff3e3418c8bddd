"""The batches of a run. Processes, workers and resumed runs read slices of the same global order."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from itertools import groupby

from torch.utils.data import Sampler

from sslkit.data.order.epoch_order import OrderPlan, Shuffle

Key = tuple[int, int]  # (epoch, sample)


@dataclass(eq=False)
class GlobalBatchSampler(Sampler[list[Key]]):
    """Yields this rank's part of each global batch, from ``start_step`` to ``total_steps``, across epochs.

    Global batch ``i`` of an epoch is the ``i``-th slice of its order; samples that do not fill a batch are dropped.
    Rank ``r`` of ``W`` takes the ``r``-th of ``W`` equal parts. The global batches do not depend on ``W``.

    Attributes:
        num_samples: Samples of an epoch.
        batch_size: Size of a global batch, over all processes.
        start_step: Step of the first batch.
        total_steps: Step after that of the last batch.
        order_variant: See `epoch_order`.
        plan: The source's own order; None for `Shuffle`.
    """

    num_samples: int
    batch_size: int
    seed: int
    _: KW_ONLY
    total_steps: int
    start_step: int = 0
    rank: int = 0
    world_size: int = 1
    order_variant: int = 0
    plan: OrderPlan | None = None

    def __post_init__(self) -> None:
        self.steps_per_epoch = self.num_samples // self.batch_size

    def starting_at(self, step: int) -> "GlobalBatchSampler":
        """The same batches from another step on."""
        return replace(self, start_step=step)

    def __len__(self) -> int:
        return self.total_steps - self.start_step

    def __iter__(self) -> Iterator[list[Key]]:
        local = self.batch_size // self.world_size
        first, last = self.rank * local, (self.rank + 1) * local
        plan = self.plan or Shuffle(self.num_samples)
        epochs = groupby(range(self.start_step, self.total_steps), lambda step: step // self.steps_per_epoch)
        for epoch, steps in epochs:
            order = plan.epoch(self.seed, epoch, self.order_variant, self.batch_size)
            for step in steps:
                samples, repeats = order.batch(step % self.steps_per_epoch, first, last)
                # A repeated image gets the key of a distant epoch, so that its views differ.
                yield [
                    (epoch + (repeat << 32), sample)
                    for repeat, sample in zip(repeats.tolist(), samples.tolist(), strict=True)
                ]
