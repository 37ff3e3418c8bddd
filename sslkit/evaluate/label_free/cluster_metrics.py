"""Clusters and dimensions of features without labels, as in CLID (Lu et al., 2023, arXiv:2206.01251)."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

ROUNDS = 50  # of k-means, at most
LARGEST_SHARE = 0.1  # of the ratios of distances, that `intrinsic_dimension` leaves out as Facco et al. do


def cluster_learnability(features: Tensor, seed: int = 0, clusters: int = 0) -> float:
    """Share of images whose k-means cluster the nearest of the images before them predicts, in a random order.

    High if features fall into clusters that few examples teach. CLID's learner is k-nearest-neighbours too, and each
    image is predicted before it is learned.

    Args:
        features: (N, D), compared by cosine after the mean is subtracted.
        seed: Of the order and of the first centres.
        clusters: Number of clusters; 0 for the square root of N.
    """
    rows = normalize(features.double() - features.double().mean(dim=0), dim=1)
    generator = torch.Generator().manual_seed(seed)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    labels = k_means(rows, clusters or max(round(math.sqrt(len(rows))), 2), generator)
    similarity = (rows @ rows.T).tril(diagonal=-1) + torch.full((len(rows), len(rows)), -math.inf).triu()
    return float((labels[similarity[1:].argmax(dim=1)] == labels[1:]).double().mean())


def k_means(rows: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Cluster of each row (N, D), by Lloyd's algorithm from centres that k-means++ draws: (N,)."""
    clusters = min(clusters, len(rows))
    centres = rows[torch.randint(len(rows), (1,), generator=generator)]
    while len(centres) < clusters:
        nearest = torch.cdist(rows, centres).amin(dim=1).square()
        chosen = torch.multinomial(nearest + 1e-12, 1, generator=generator)
        centres = torch.cat([centres, rows[chosen]])
    labels = torch.cdist(rows, centres).argmin(dim=1)
    for _ in range(ROUNDS):
        for cluster in range(len(centres)):
            if (labels == cluster).any():
                centres[cluster] = rows[labels == cluster].mean(dim=0)
        moved = torch.cdist(rows, centres).argmin(dim=1)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels


def intrinsic_dimension(features: Tensor) -> float | None:
    """Two-NN (Facco et al., 2017, arXiv:1803.06992): the dimension of the surface that features (N, D) lie on.

    With the ratios mu of the distances to the second and to the first neighbour, 1 - F(mu) = mu^-d; d is the slope of
    the line through the origin, without the largest tenth of the ratios. None with fewer than 10 distinct rows.
    """
    rows = torch.unique(features.double(), dim=0)
    if len(rows) < 10:
        return None
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")  # the other way loses digits
    first, second = distances.topk(3, dim=1, largest=False).values[:, 1:].unbind(dim=1)
    ratios = (second / first.clamp_min(1e-300)).log().sort().values
    kept = int(len(ratios) * (1.0 - LARGEST_SHARE))
    x = ratios[:kept]
    y = -(1.0 - torch.arange(1, kept + 1, dtype=torch.float64) / len(ratios)).log()
    return float((x @ y) / (x @ x).clamp_min(1e-300))
