"""What a loss must be on embeddings that know nothing of each other.

For K random unit vectors in d dimensions the sum of exp(s / tau) is not K: at small tau the few that happen to lie
close weigh most. Its mean is K E with

    E = Gamma(d / 2) (2 tau)^(d/2 - 1) I_(d/2 - 1)(1 / tau)        (I: modified Bessel function of the first kind)

so chance level is ln K + ln E, about ln K + 1 / (2 d tau^2), and not ln(K + 1): for MoCo v1 11.88, not 11.09.
"""

import math
from dataclasses import dataclass

from sslkit.methods import Method
from sslkit.methods.byol import BYOL
from sslkit.methods.instdisc import InstDisc
from sslkit.methods.mechanisms import EndToEnd, MemoryBankMechanism
from sslkit.methods.moco_v1 import MoCoV1
from sslkit.methods.moco_v3 import MoCoV3
from sslkit.methods.simclr import SimCLR
from sslkit.methods.swav import SwAV


def log_mean_exp(dim: int, temperature: float) -> float:
    """ln E: the log of the mean of exp(s / temperature) over random unit vectors in ``dim`` dimensions.

    The Bessel function's series, every term positive, summed in logarithms; no overflow at any temperature.
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
class InfoNCE:
    """A contrastive loss: ``scale`` times the cross-entropy of one positive among ``negatives``.

    Attributes:
        scale: What multiplies the mean cross-entropy, directions added up.
        negatives: How many a positive is compared with.
        temperature: Divides the similarities.
        dim: Width of the embeddings.
    """

    scale: float
    negatives: int
    temperature: float
    dim: int

    def level(self, similarity: float) -> float:
        """Expected loss where every positive has this similarity and the negatives are random."""
        positive = similarity / self.temperature
        others = math.log(self.negatives) + log_mean_exp(self.dim, self.temperature)
        high, low = max(positive, others), min(positive, others)
        return self.scale * (high + math.log1p(math.exp(low - high)) - positive)

    def tolerance(self, rows: int) -> float:
        """How far the mean over ``rows`` random queries may lie from `level`."""
        log_square = log_mean_exp(self.dim, self.temperature / 2)
        spread = math.exp(min(log_square - 2 * log_mean_exp(self.dim, self.temperature), 50.0)) - 1
        share = spread / self.negatives
        return self.scale * (0.004 + 5 * math.sqrt(2 * share / rows) + 2 * share)


def contrast_of(method: Method, batch: int) -> InfoNCE | None:
    """The contrastive loss that the paper's method has on a global batch, if it is one."""
    if not isinstance(method, MoCoV1 | MoCoV3 | SimCLR | EndToEnd | MemoryBankMechanism):
        return None
    options = method.options
    scale, negatives = 1.0, batch - 1
    if isinstance(method, MoCoV1):
        scale, negatives = (2.0 if method.options.symmetric else 1.0), method.options.queue_size
    elif isinstance(method, MoCoV3):
        scale = 4 * options.temperature
    elif isinstance(method, SimCLR):
        scale, negatives = 2.0, 2 * batch - 2
    elif isinstance(method, EndToEnd):
        scale = 2.0 if method.options.symmetric else 1.0
    else:
        negatives = method.options.negatives
    return InfoNCE(scale, negatives, options.temperature, options.dim)


def sum_of(method: Method) -> InfoNCE | None:
    """The sum in the denominator of a loss that is no InfoNCE: over prototypes, noise, or all memories."""
    if isinstance(method, SwAV):
        return InfoNCE(1.0, method.options.prototypes, method.options.temperature, method.options.dim)
    if isinstance(method, InstDisc):
        terms = method.options.negatives if method.options.loss == "nce" else len(method.bank.rows)
        return InfoNCE(1.0, terms, method.options.temperature, method.options.dim)
    return None


def chance_level(method: Method, batch: int) -> tuple[float, str] | None:
    """The loss at chance and its formula in words, for the methods whose loss is known."""
    contrast = contrast_of(method, batch)
    if contrast is not None:
        words = f"ln {contrast.negatives} + {log_mean_exp(contrast.dim, contrast.temperature):.3f}"
        return contrast.level(0.0), words if contrast.scale == 1.0 else f"{contrast.scale:g} x ({words})"
    if isinstance(method, BYOL):
        return 4.0, "2 - 2 cos in both directions"
    terms = sum_of(method)
    if terms is None:
        return None
    # NCE asks of every noise sample too, which adds 1.
    more = 1.0 if isinstance(method, InstDisc) and method.options.loss == "nce" else 0.0
    more += log_mean_exp(terms.dim, terms.temperature)
    return math.log(terms.negatives) + more, f"ln {terms.negatives} + {more:.3f}"


def noise_of_mean(method: Method, rows: int) -> float:
    """Standard error that the positives' own similarities add to the mean loss of ``rows`` random queries."""
    options = getattr(method, "options", None)
    dim, temperature = getattr(options, "dim", None), getattr(options, "temperature", 1.0)
    return 1.0 / (temperature * math.sqrt(dim * rows)) if dim else 0.0
