"""Clusters and dimensions against formulas of their own, and on data whose answer is known."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from sslkit.evaluate.label_free.cluster_metrics import cluster_learnability, intrinsic_dimension, k_means


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_intrinsic_dimension_of_an_embedded_cube(dimension: int) -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.rand(1500, dimension, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(20, dimension, generator=generator, dtype=torch.float64)).Q
    found = intrinsic_dimension(flat @ basis.T)
    assert found == pytest.approx(dimension, rel=0.12)
    distances = NearestNeighbors(n_neighbors=3).fit(flat).kneighbors(flat)[0]
    log_mu = np.sort(np.log(distances[:, 2] / distances[:, 1]))
    likelihood = len(log_mu) / log_mu.sum()  # another estimate of the same law
    assert found == pytest.approx(likelihood, rel=0.1)
    kept = log_mu[:1350]
    slope = np.linalg.lstsq(kept[:, None], -np.log(1 - np.arange(1, 1351) / 1500), rcond=None)[0][0]
    assert found == pytest.approx(slope, rel=1e-9)


def test_too_few_distinct_rows_have_no_dimension() -> None:
    assert intrinsic_dimension(torch.ones(50, 3)) is None


def test_blobs_are_learnable_and_noise_is_less() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 16, generator=generator) * 20
    blobs = centres[torch.arange(240) % 6] + torch.randn(240, 16, generator=generator)
    labels = k_means(blobs.double(), 6, torch.Generator().manual_seed(1))
    assert all(len(labels[torch.arange(240) % 6 == blob].unique()) == 1 for blob in range(6))
    high = cluster_learnability(blobs, clusters=6)
    low = cluster_learnability(torch.randn(240, 16, generator=generator), clusters=6)
    assert high > 0.95
    assert low < 0.75


def test_learnability_is_the_share_predicted_from_the_images_before() -> None:
    rows = torch.randn(60, 4, generator=torch.Generator().manual_seed(2)).double()
    unit = rows - rows.mean(dim=0)
    unit = unit / unit.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(3)
    unit = unit[torch.randperm(60, generator=generator)]
    labels = k_means(unit, 8, generator)
    right = [labels[np.argmax(unit[:row] @ unit[row])] == labels[row] for row in range(1, 60)]
    assert cluster_learnability(rows, seed=3, clusters=8) == pytest.approx(float(np.mean(right)))
