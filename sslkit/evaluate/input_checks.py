"""Checks of inputs that all evaluations share: finite features, known protocols, valid seeds and learning rates."""

import math
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from sslkit.errors import UserError, near_miss

AnyProtocol = TypeVar("AnyProtocol")
LARGEST_SEED = 2**63 - 2  # torch accepts one more, but some protocols also use seed + 1


def as_features(features: Tensor, name: str) -> Tensor:
    """Convert features (N, D) to torch's default dtype. Raises `UserError` if a value is NaN or infinite."""
    check_finite(features, name)
    return features.to(torch.get_default_dtype())


def check_finite(features: Tensor, name: str) -> None:
    """Raise `UserError` if a value is NaN or infinite. Allocates no memory."""
    if features.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(features)):
        raise UserError(f"{name}: the features are not finite (NaN or infinity), so they cannot be evaluated")


def choose_protocol(evaluation: str, name: str, protocols: Mapping[str, AnyProtocol]) -> AnyProtocol:
    """The protocol of this name. Raises `UserError` if there is none."""
    if name not in protocols:
        hint = near_miss(name, protocols)
        raise UserError(f"{evaluation}: unknown protocol {name!r}{hint}; must be one of {', '.join(protocols)}")
    return protocols[name]


def check_seed(seed: int, where: str) -> None:
    """Raise `UserError` if a generator cannot take the seed."""
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"{where}: the seed must be between 0 and {LARGEST_SEED}, not {seed}")


def check_rates(rates: Iterable[float], where: str, *, zero: bool = False) -> None:
    """Raise `UserError` unless all rates are finite and positive, or 0 where ``zero`` allows it."""
    for rate in rates:
        if not (math.isfinite(rate) and (rate > 0 or (zero and rate == 0))):
            raise UserError(f"{where}: must be finite and {'0 or more' if zero else 'above 0'}, not {rate:g}")
