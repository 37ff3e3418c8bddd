"""The order of samples in an epoch, and the protocol of sources that need an order of their own."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class EpochOrder(Protocol):
    """The samples of one epoch, batch by batch."""

    def batch(self, number: int, first: int, last: int) -> tuple[Indices, Indices]:
        """Samples ``first`` to ``last - 1`` of a global batch, and how often each has occurred before in the epoch."""


class OrderPlan(Protocol):
    """How a source orders its samples. Implemented by `Shuffle`, `Mixture` and `StreamOrder`."""

    def epoch(self, seed: int, epoch: int, order_variant: int, batch_size: int) -> EpochOrder:
        """The order of an epoch. ``batch_size`` is that of all processes; see `epoch_order` for ``order_variant``."""

    def groups_held(self, batch_size: int, num_processes: int, num_workers: int) -> int:
        """Row groups that one worker of one process reads from at the same time; 0 if rows are read one by one."""
        return 0


def epoch_order(seed: int, epoch: int, num_samples: int, order_variant: int = 0) -> Indices:
    """A permutation of ``range(num_samples)``.

    ``order_variant`` counts how often the run has gone back to a checkpoint to continue with another order.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch + (order_variant << 32)]))
    return generator.permutation(num_samples)


@dataclass(frozen=True)
class ArrayOrder:
    """An epoch's order that is stored as an array; batch ``i`` is its ``i``-th slice of ``batch_size``."""

    samples: Indices
    repeats: Indices  # how often each sample has occurred before in the epoch
    batch_size: int

    def batch(self, number: int, first: int, last: int) -> tuple[Indices, Indices]:
        """See `EpochOrder.batch`."""
        part = slice(number * self.batch_size + first, number * self.batch_size + last)
        return self.samples[part], self.repeats[part]


@dataclass(frozen=True)
class Shuffle(OrderPlan):
    """Every sample once per epoch, in random order."""

    num_samples: int

    def epoch(self, seed: int, epoch: int, order_variant: int, batch_size: int) -> EpochOrder:
        """See `OrderPlan.epoch`."""
        order = epoch_order(seed, epoch, self.num_samples, order_variant)
        return ArrayOrder(order, np.zeros_like(order), batch_size)
