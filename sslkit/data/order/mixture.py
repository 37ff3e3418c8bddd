"""Several sources in the shares that their weights say: an epoch's samples as a pure function of (seed, epoch)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sslkit.random_draws import DrawPurpose

Samples = NDArray[np.int64]


@dataclass(frozen=True)
class Mixture:
    """Sources that lie one after the other in a table.

    Attributes:
        sizes: Images of each.
        weights: Share of each, beside the others'.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    def shares(self) -> list[float]:
        """Weights that sum to 1."""
        parts = [weight / max(self.weights) for weight in self.weights]  # whose sum is finite, as theirs may not be
        return [part / sum(parts) for part in parts]

    def counts(self) -> list[int]:
        """Samples of an epoch from each source: shares of as many as there are images, rounded to keep the sum."""
        total = sum(self.sizes)
        shares = [total * share for share in self.shares()]
        counts = [int(share) for share in shares]
        by_rest = sorted(range(len(shares)), key=lambda part: counts[part] - shares[part])
        for part in by_rest[: total - sum(counts)]:
            counts[part] += 1
        return counts

    def samples(self, seed: int, epoch: int) -> tuple[Samples, Samples]:
        """Positions of an epoch's samples, source by source, and for each how often it has come before in the epoch.

        A source is gone through again and again, each time in another order, and an epoch takes up where the one before
        it left off: no image of a source comes twice before all of them have come once.
        """
        parts, repeats, start = [], [], 0
        for part, (size, count) in enumerate(zip(self.sizes, self.counts(), strict=True)):
            begin, end = epoch * count, (epoch + 1) * count
            for lap in range(begin // size, -(-end // size)):
                order = np.random.default_rng([seed, DrawPurpose.MIXTURE, part, lap]).permutation(size)
                taken = order[max(begin - lap * size, 0) : end - lap * size]
                parts.append(taken + start)
                repeats.append(np.full(len(taken), lap - begin // size))
            start += size
        return np.concatenate(parts), np.concatenate(repeats)
