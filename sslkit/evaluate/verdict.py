"""Whether one encoder is better than others on the same images: paired differences, their intervals and a sentence."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sslkit.text import join, pluralize

RESAMPLES = 10_000
QUANTILES = (0.025, 0.975)
# Half an image on which only one is right, for each of the two, and one on which both are equal (Agresti and Min, 2005,
# doi:10.1002/sim.1781). Without them, four images that only one gets right are already a difference to the bootstrap.
SMOOTHING = (-1.0, 0.0, 0.0, 1.0)
COPIES = 2  # of each image, so that `SMOOTHING` counts half
MAX_VALUES = 16  # different values up to which their counts are drawn, instead of images
CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Difference:
    """The difference of two scores of the same images, in percentage points.

    Attributes:
        points: Mean over the images, positive if the first is better.
        low: Lower end of the 95 % interval.
        high: Upper end.
        images: Number of images.
    """

    points: float
    low: float
    high: float
    images: int

    @property
    def is_better(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0.0

    @property
    def is_worse(self) -> bool:
        """Whether the whole interval is below 0."""
        return self.high < 0.0

    def __str__(self) -> str:
        """Such as ``better by 2.1 points (0.9 to 3.3)`` or ``no difference seen (-0.8 to 1.1)``."""
        if not self.is_better and not self.is_worse:
            return f"no difference seen ({_format(self.low)} to {_format(self.high)})"
        return f"{'better' if self.is_better else 'worse'} by {self.size}"

    @property
    def size(self) -> str:
        """How large the difference is, without its sign, such as ``2.1 points (0.9 to 3.3)``."""
        low, high = sorted((abs(self.low), abs(self.high)))
        digits = next((digits for digits in (1, 2) if round(low, digits)), 3)
        ends = f"{_format(low, digits)} to {_format(high, digits)}"
        return f"{_format(abs(self.points), digits)} points ({ends})"


def paired_difference(correct_a: ArrayLike, correct_b: ArrayLike, *, seed: int = 0) -> Difference:
    """How much better ``a`` is than ``b``: the mean difference and its bootstrap 95 % interval over the images.

    The interval says what other test images would give. It does not contain the chance of pretraining again, or of
    other images to train the classifier on.

    Args:
        correct_a: Whether each image is classified correctly, (N,) bool; or a score of each image in [0, 1].
        correct_b: The same of the other encoder, for the same images in the same order.
        seed: Seed of the resamples. The result depends on the arguments alone.

    Raises:
        ValueError: The arrays differ in length, are empty, or hold values outside of [0, 1].
    """
    first, second = (np.asarray(each, dtype=np.float64) for each in (correct_a, correct_b))
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise ValueError(f"paired difference: needs two arrays of one length, not {first.shape} and {second.shape}")
    if not all(np.all((each >= 0.0) & (each <= 1.0)) for each in (first, second)):
        raise ValueError("paired difference: values must be in [0, 1]")
    resamples = _resampled_means(first - second, np.random.default_rng(seed))
    return resampled_difference(float((first - second).mean()), resamples, len(first))


def resampled_difference(mean: float, resamples: NDArray[np.float64], images: int) -> Difference:
    """The difference whose value is ``mean`` on all ``images``, and ``resamples`` on resamples of them."""
    low, high = np.quantile(resamples, QUANTILES)
    return Difference(100 * mean, 100 * float(low), 100 * float(high), images)


def verdict(differences: Mapping[str, Difference]) -> str:
    """One sentence on how an encoder stands against baselines, from its differences from them; empty for none.

    What it does not beat comes first. A baseline is beaten if the whole interval is above 0.
    """
    if not differences:
        return ""
    beaten = [f"{name} by {each.size}" for name, each in differences.items() if each.is_better]
    others = [f"{name}: {each}" for name, each in differences.items() if not each.is_better]
    clauses = [f"does not beat {', nor '.join(others)}"] if others else []
    if beaten:
        every = "" if others or len(beaten) == 1 else "every baseline: "
        clauses.append(f"{'it ' if others else ''}beats {every}{join(beaten)}")
    images = pluralize(max(each.images for each in differences.values()), "test image")
    return f"The encoder {'; '.join(clauses)} (95 % intervals, paired over {images})"


def _resampled_means(differences: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of `RESAMPLES` resamples of the differences and `SMOOTHING`."""
    population = np.sort(np.concatenate([*[differences] * COPIES, SMOOTHING]))
    size = len(population) // COPIES
    values, counts = np.unique(population, return_counts=True)
    if len(values) <= MAX_VALUES:
        means: NDArray[np.float64] = rng.multinomial(size, counts / len(population), size=RESAMPLES) @ values / size
        return means
    rows = max(CHUNK_ELEMENTS // size, 1)
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    return np.concatenate([population[rng.integers(len(population), size=(each, size))].mean(axis=1) for each in sizes])


def _format(points: float, digits: int = 1) -> str:
    return f"{round(points, digits) + 0.0:.{digits}f}"  # + 0.0: not -0.0
