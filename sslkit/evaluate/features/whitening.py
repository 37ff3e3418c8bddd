"""Whitening: features with equal variance in all directions, fitted on features without labels."""

import torch
from torch import Tensor

SHRINKAGE = 1.0  # times the mean variance, added to each direction's: else the last, noisy ones count as the first


def whiten(bank: Tensor, *others: Tensor, shrinkage: float = SHRINKAGE) -> list[Tensor]:
    """Whiten features by the mean and the principal components of a bank.

    Args:
        bank: (N, D) features that mean and components are computed from.
        others: (M, D) features that are transformed alike.
        shrinkage: Of the variances; see `SHRINKAGE`.

    Returns:
        The bank and the others, (N, K) and (M, K) float32, K = min(N, D).
    """
    rows = bank.double()
    mean = rows.mean(dim=0)
    _, singular, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    variances = singular.square() / len(rows)
    average = variances.sum() / rows.shape[1]
    scale = (variances + shrinkage * average.clamp_min(1e-30)).rsqrt()
    return [((each.double() - mean) @ directions.T * scale).float() for each in (bank, *others)]
