"""Metrics of embeddings or features that need no labels: collapse, effective dimensions, and agreement between views.

Shapes: N images, Q views of each, D dimensions. Computed in float64: near a collapse, float32 is too coarse.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

FIT_FIRST, FIT_LAST = 11, 100  # ranks of the eigenvalues that `alpha_req` fits
MIN_FITTED = 10
HISTOGRAM_EDGES = tuple(round(-1.0 + 0.05 * step, 2) for step in range(41))


@dataclass(frozen=True)
class LabelFreeMetrics:
    """All metrics of this module, under the keys of diagnostics.jsonl.

    Attributes:
        embedding_std: `embedding_std` of the first two views together.
        effective_rank: `effective_rank` of the first two views together.
        alpha_req: `alpha_req` of the first two views together; None if there are too few eigenvalues.
        lidar: `lidar` of all views; None for two views, which are too few.
        alignment: `alignment` of the first two views.
        uniformity: `uniformity`, mean of the first two views.
        pretext_top1: `pretext_top1` of the first two views.
        positive_histogram: Histogram of cosine similarities between the first two views of an image.
        negative_histogram: Histogram of cosine similarities between the first view of an image and the second view of
            each other image.
        histogram_edges: Edges of the bins.
    """

    embedding_std: float
    effective_rank: float
    alpha_req: float | None
    lidar: float | None
    alignment: float
    uniformity: float
    pretext_top1: float
    positive_histogram: list[int]
    negative_histogram: list[int]
    histogram_edges: list[float]

    def to_dict(self) -> dict[str, float | list[int] | list[float]]:
        """The metrics that are not None."""
        return {name: value for name, value in vars(self).items() if value is not None}


def label_free_metrics(embeddings: Tensor) -> LabelFreeMetrics:
    """Compute all metrics of embeddings (N, Q, D), Q >= 2, which need not be normalised."""
    embeddings = embeddings.detach().to("cpu", torch.float64)
    first, second = embeddings[:, 0], embeddings[:, 1]
    both = torch.cat([first, second])
    positive, negative = similarity_histograms(first, second)
    return LabelFreeMetrics(
        embedding_std=embedding_std(both),
        effective_rank=effective_rank(both),
        alpha_req=alpha_req(both),
        lidar=lidar(embeddings) if embeddings.shape[1] > 2 else None,
        alignment=alignment(first, second),
        uniformity=(uniformity(first) + uniformity(second)) / 2,
        pretext_top1=pretext_top1(first, second),
        positive_histogram=positive,
        negative_histogram=negative,
        histogram_edges=list(HISTOGRAM_EDGES),
    )


def embedding_std(embeddings: Tensor) -> float:
    """Standard deviation of L2-normalised embeddings, mean over dimensions (SimSiam, arXiv:2011.10566, section 4.1).

    0 if all embeddings (N, D), N >= 2, are equal; 1 / sqrt(D) if they are uniform on the sphere.
    """
    return float(_unit(embeddings).std(dim=0).mean())


def effective_rank(embeddings: Tensor, eps: float = 1e-7) -> float:
    """RankMe (Garrido et al., arXiv:2210.02885, eq. 1): exp of the entropy of the normalised singular values.

    Between 1 (one direction) and min(N, D) for embeddings (N, D), neither normalised nor centred. It grows with N:
    compare values of the same N only. ``eps`` is added to each normalised singular value (the paper's for float32).
    """
    embeddings = embeddings.double()
    return _exp_entropy(_gram_eigenvalues(embeddings).sqrt(), min(embeddings.shape), eps)


def lidar(embeddings: Tensor, delta: float = 1e-4, eps: float = 1e-7) -> float:
    """LiDAR (Thilak et al., arXiv:2312.04000, section 4): effective rank of LDA with each image as a class.

    S_b is the covariance of the images' means, S_w the covariance of the views around their mean, plus ``delta`` times
    the identity. The result is exp of the entropy of the normalised eigenvalues of S_w^(-1/2) S_b S_w^(-1/2): the
    number of directions that separate images but not views. Between 1 and min(N - 1, D) for embeddings (N, Q, D); the
    paper uses N = 1000 and Q = 50. Published code uses a ``delta`` of 1e-6 to 1e-3. ``eps`` is added to eigenvalues.
    """
    embeddings = embeddings.double()
    images, views, width = embeddings.shape
    means = embeddings.mean(dim=1)
    scatter = (embeddings - means[:, None]).flatten(0, 1)
    between = means - means.mean(dim=0)
    if width > images * views:
        # Outside the span of the rows, S_b is 0 and S_w is delta times the identity, so a basis of the span suffices.
        basis = torch.linalg.qr(torch.cat([scatter, between]).T).Q
        scatter, between = scatter @ basis, between @ basis
    within = scatter.T @ scatter / (images * views)
    within.diagonal().add_(delta)
    # With S_w = L L^T, L^(-1) S_b L^(-T) has the same eigenvalues as the symmetric form.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), between.T, upper=False)
    return _exp_entropy(_gram_eigenvalues(whitened.T), width, eps)


def alpha_req(embeddings: Tensor) -> float | None:
    """alpha-ReQ (Agrawal et al., NeurIPS 2022): exponent of the power law of the covariance's eigenvalues.

    The i-th eigenvalue of embeddings (N, D) is about i^(-alpha). In the paper, the best features have alpha close to 1.
    Fitted as in the official code: log-log, from the 11th to the 100th eigenvalue, with weights 1 / i. None if fewer
    than 10 of them are positive.
    """
    embeddings = embeddings.double()
    eigenvalues = _gram_eigenvalues(embeddings - embeddings.mean(dim=0))
    positive = int((eigenvalues > 1e-12 * eigenvalues[0].clamp(min=1e-30)).sum())
    last = min(FIT_LAST, positive, len(embeddings) - 1)
    if last - FIT_FIRST + 1 < MIN_FITTED:
        return None
    ranks = torch.arange(FIT_FIRST, last + 1, dtype=torch.float64)
    x, y, weights = ranks.log(), eigenvalues[FIT_FIRST - 1 : last].log(), 1 / ranks
    x_mean, y_mean = (weights @ x) / weights.sum(), (weights @ y) / weights.sum()
    return -float((weights * (x - x_mean)) @ (y - y_mean) / (weights @ (x - x_mean).square()))


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance between two views (N, D) on the unit sphere (Wang & Isola, arXiv:2005.10242, alpha = 2).

    0 if the views of each image agree, 2 if they are unrelated.
    """
    return float((_unit(first) - _unit(second)).square().sum(dim=1).mean())


def uniformity(embeddings: Tensor) -> float:
    """Log of the mean Gaussian potential of all pairs on the unit sphere (Wang & Isola, arXiv:2005.10242, t = 2).

    0 if all embeddings (N, D), N >= 2, are equal; about -4 if they are uniform on the sphere and D is large.
    """
    return float(torch.pdist(_unit(embeddings)).square().mul(-2).exp().mean().log())


def similarity_histograms(first: Tensor, second: Tensor) -> tuple[list[int], list[int]]:
    """Histograms of cosine similarities in the bins of `HISTOGRAM_EDGES`: of positive and of negative pairs.

    ``first`` and ``second`` (N, D) are two views of N images. Rows of equal index are the N positive pairs, all others
    the N (N - 1) negative pairs.
    """
    similarity = _similarities(first, second)
    own = torch.eye(len(similarity), dtype=torch.bool)
    return _histogram(similarity[own]), _histogram(similarity[~own])


def pretext_top1(first: Tensor, second: Tensor) -> float:
    """Share of images whose first view (N, D) is more similar to their own second view than to any other second view.

    Ties count as wrong, so a collapse scores 0.
    """
    similarity = _similarities(first, second)
    others = similarity.masked_fill(torch.eye(len(similarity), dtype=torch.bool), -math.inf)
    return float((similarity.diagonal() > others.amax(dim=1)).double().mean())


def _unit(embeddings: Tensor) -> Tensor:
    return normalize(embeddings.double(), dim=1)


def _similarities(first: Tensor, second: Tensor) -> Tensor:
    return _unit(first) @ _unit(second).T


def _histogram(similarities: Tensor) -> list[int]:
    counts = torch.histogram(similarities.clamp(-1.0, 1.0), torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64)).hist
    return [int(count) for count in counts]


def _gram_eigenvalues(rows: Tensor) -> Tensor:
    """Squared singular values of (N, D), largest first, from the smaller of the two Gram matrices."""
    smaller = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    eigenvalues: Tensor = torch.linalg.eigvalsh(smaller)
    return eigenvalues.clamp(min=0).flip(0)


def _exp_entropy(values: Tensor, count: int, eps: float) -> float:
    """exp of the entropy of the normalised values, padded with zeros to ``count``."""
    total = float(values.sum())
    if not total > 0:
        return 1.0  # all embeddings are equal: as for one direction
    shares = torch.cat([values, values.new_zeros(max(count - len(values), 0))]) / total + eps
    return float((-(shares * shares.log()).sum()).exp())
