"""The loss at chance: what it is on embeddings that are independent of each other.

For K random unit vectors in d dimensions the sum of exp(s / tau) is not K: at a small temperature tau the few vectors
that happen to lie close weigh most. Its mean is K E with

    E = Gamma(d / 2) (2 tau)^(d/2 - 1) I_(d/2 - 1)(1 / tau)        (I: modified Bessel function of the first kind)

so the loss at chance is ln K + ln E, about ln K + 1 / (2 d tau^2), not ln(K + 1): 11.88 for MoCo v1, not 11.09.
"""

import math
from dataclasses import dataclass


def log_mean_exp(dim: int, temperature: float) -> float:
    """ln E: log of the mean of exp(s / temperature) over random unit vectors in ``dim`` dimensions.

    Sums the series of the Bessel function, whose terms are all positive, in logarithms: no temperature overflows.
    """
    half, log_quarter = dim / 2, 2 * math.log(0.5 / temperature)
    terms, largest = [], -math.inf
    for order in range(1_000_000):
        term = order * log_quarter + math.lgamma(half) - math.lgamma(order + 1) - math.lgamma(order + half)
        terms.append(term)
        largest = max(largest, term)
        if term < largest - 40.0:  # past the peak, and below the last digit
            break
    return largest + math.log(math.fsum(math.exp(term - largest) for term in terms))


@dataclass(frozen=True)
class RandomNegatives:
    """The sum over random unit vectors in a softmax's denominator.

    Attributes:
        count: Number of vectors K.
        temperature: Divides the similarities.
        dim: Width of the embeddings d.
    """

    count: int
    temperature: float
    dim: int

    @property
    def log_sum(self) -> float:
        """ln K + ln E."""
        return math.log(self.count) + log_mean_exp(self.dim, self.temperature)

    def tolerance(self, rows: int) -> float:
        """How far the mean of the log sum over ``rows`` random queries may lie from `log_sum`."""
        log_square = log_mean_exp(self.dim, self.temperature / 2)
        spread = math.exp(min(log_square - 2 * log_mean_exp(self.dim, self.temperature), 50.0)) - 1
        share = spread / self.count
        return 0.004 + 5 * math.sqrt(2 * share / rows) + 2 * share


@dataclass(frozen=True)
class ChanceLoss:
    """The loss on embeddings that are independent of each other.

    Attributes:
        value: The loss, in nats where it is a cross-entropy.
        formula: Where it comes from, in a few words: ``"ln 4095 + 0.390"``.
        dim: Width of the embeddings; 0 if it does not matter.
        temperature: Divides the similarities.
        scale: Factor on the mean over the queries, such as 2 for the sum of two directions.
        negatives: The sum in the denominator, where there is one.
        is_info_nce: Whether the loss is ``scale`` times the cross-entropy of one positive among ``negatives``.
    """

    value: float
    formula: str
    dim: int = 0
    temperature: float = 1.0
    scale: float = 1.0
    negatives: RandomNegatives | None = None
    is_info_nce: bool = False

    def at_similarity(self, similarity: float) -> float:
        """InfoNCE where every positive has this cosine similarity to its query and the negatives are random."""
        assert self.negatives is not None
        positive, others = similarity / self.temperature, self.negatives.log_sum
        high, low = max(positive, others), min(positive, others)
        return self.scale * (high + math.log1p(math.exp(low - high)) - positive)

    def tolerance(self, rows: int) -> float:
        """How far the mean over ``rows`` random queries may lie off because of its random negatives."""
        return self.scale * self.negatives.tolerance(rows) if self.negatives is not None else 0.0

    def standard_error(self, rows: int) -> float:
        """Standard error of the mean over ``rows`` random queries, from the variance of their positives alone."""
        return 1.0 / (self.temperature * math.sqrt(self.dim * rows)) if self.dim else 0.0


def info_nce_chance_loss(num_negatives: int, temperature: float, dim: int, scale: float = 1.0) -> ChanceLoss:
    """Chance-level loss of ``scale`` times the cross-entropy of one positive among random negatives.

    Args:
        num_negatives: How many negatives each positive is compared with.
        temperature: Divides the similarities.
        dim: Width of the embeddings.
        scale: Factor on the mean cross-entropy: 2 for the sum of two directions.
    """
    negatives = RandomNegatives(num_negatives, temperature, dim)
    formula = f"ln {num_negatives} + {log_mean_exp(dim, temperature):.3f}"
    formula = formula if scale == 1.0 else f"{scale:g} x ({formula})"
    known = ChanceLoss(0.0, formula, dim, temperature, scale, negatives, is_info_nce=True)
    return ChanceLoss(known.at_similarity(0.0), formula, dim, temperature, scale, negatives, is_info_nce=True)


def softmax_chance_loss(num_terms: int, temperature: float, dim: int, extra: float = 0.0) -> ChanceLoss:
    """Chance-level loss of a cross-entropy over ``num_terms`` random vectors, plus a constant ``extra``."""
    terms = RandomNegatives(num_terms, temperature, dim)
    extra += log_mean_exp(dim, temperature)
    formula = f"ln {num_terms} + {extra:.3f}"
    return ChanceLoss(math.log(num_terms) + extra, formula, dim, temperature, 1.0, terms)
