"""What every evaluation refuses before it computes: features that are no numbers, and seeds that cannot be used."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from sslkit.errors import UserError

LARGEST_SEED = 2**63 - 2  # torch takes one more, and some protocols draw from the next seed


def as_features(features: Tensor, whose: str) -> Tensor:
    """Features (N, D) in torch's default precision, float32 unless it was changed.

    Args:
        features: Of any precision; a float32 tensor is not copied.
        whose: How to name them in an error.

    Raises:
        UserError: Some are NaN or infinite.
    """
    check_finite(features, whose)
    return features.to(torch.get_default_dtype())


def check_finite(features: Tensor, whose: str) -> None:
    """Refuse features of which any is NaN or infinite. Takes one pass and no memory.

    Raises:
        UserError: Some are.
    """
    if features.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(features)):
        raise UserError(f"{whose}: its features are not finite, so there is nothing to judge")


def check_seed(seed: int, where: str) -> None:
    """Refuse a seed that a generator cannot take.

    Raises:
        UserError: It is negative or too large.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"{where}: a seed must lie within 0 and {LARGEST_SEED}, not {seed}")


def check_rates(rates: Iterable[float], what: str, *, zero: bool = False) -> None:
    """Refuse rates or penalties that no optimizer can use.

    Args:
        rates: Each must be finite and positive.
        what: How to name them in an error.
        zero: Whether 0 is a rate, too.

    Raises:
        UserError: One is not.
    """
    for rate in rates:
        if not (math.isfinite(rate) and (rate > 0 or (zero and rate == 0))):
            raise UserError(f"{what}: must be finite and {'0 or more' if zero else 'above 0'}, not {rate:g}")
