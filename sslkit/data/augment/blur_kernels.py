"""One-dimensional kernels of Gaussian blurs."""

import numpy as np
from numpy.typing import NDArray

CUTOFF = 3.5  # standard deviations at which a kernel ends; below sigma 2/7 it would be a single pixel


def gaussian_kernel(sigma: float, radius: int) -> NDArray[np.float64]:
    """Weights of the ``2 * radius + 1`` nearest pixels, of sum 1."""
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return np.asarray(weights / weights.sum())


def small_kernel(sigma: float) -> NDArray[np.float64]:
    """Weights of the 3 nearest pixels, with a third of the Gaussian's variance: for a blur of three passes."""
    side = sigma**2 / 6.0
    return np.array([side, 1.0 - 2.0 * side, side])
