"""Several sources in proportion to their weights."""

from dataclasses import dataclass

import numpy as np

from sslkit.data.order.epoch_order import ArrayOrder, EpochOrder, Indices, OrderPlan, epoch_order
from sslkit.random_draws import DrawPurpose


@dataclass(frozen=True)
class Mixture(OrderPlan):
    """The order of several sources that are concatenated in one table; an epoch has as many samples as the table."""

    sizes: tuple[int, ...]  # number of images of each source
    weights: tuple[float, ...]  # relative weight of each source

    def shares(self) -> list[float]:
        """The weights, normalised to a sum of 1."""
        scaled = [weight / max(self.weights) for weight in self.weights]  # the sum of the weights may overflow
        return [weight / sum(scaled) for weight in scaled]

    def counts(self) -> list[int]:
        """Samples per epoch of each source, rounded so that their sum is the number of images."""
        total = sum(self.sizes)
        exact = [total * share for share in self.shares()]
        counts = [int(count) for count in exact]
        by_remainder = sorted(range(len(exact)), key=lambda source: counts[source] - exact[source])
        for source in by_remainder[: total - sum(counts)]:
            counts[source] += 1
        return counts

    def samples(self, seed: int, epoch: int) -> tuple[Indices, Indices]:
        """An epoch's samples, source by source, and how often each has occurred before in the epoch.

        Each source is traversed again and again, in a new order each time, and an epoch continues where the previous
        one stopped. So no image of a source occurs twice before all of them have occurred once.
        """
        samples, repeats, offset = [], [], 0
        for source, (size, count) in enumerate(zip(self.sizes, self.counts(), strict=True)):
            begin, end = epoch * count, (epoch + 1) * count
            for lap in range(begin // size, -(-end // size)):
                order = np.random.default_rng([seed, DrawPurpose.MIXTURE, source, lap]).permutation(size)
                taken = order[max(begin - lap * size, 0) : end - lap * size]
                samples.append(taken + offset)
                repeats.append(np.full(len(taken), lap - begin // size))
            offset += size
        return np.concatenate(samples), np.concatenate(repeats)

    def epoch(self, seed: int, epoch: int, order_variant: int, batch_size: int) -> EpochOrder:
        """See `OrderPlan.epoch`."""
        order = epoch_order(seed, epoch, sum(self.sizes), order_variant)
        samples, repeats = self.samples(seed, epoch)
        return ArrayOrder(samples[order], repeats[order], batch_size)
