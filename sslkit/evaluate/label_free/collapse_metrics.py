"""What embeddings tell without a label: whether they collapse, how many directions they use, how views agree.

Pure functions of embeddings; features of the backbone serve as well. All compute in float64 on the CPU: the matrices
are small, and near a collapse float32 rounds away what is asked for.

Shapes: N images, Q views of each, D width.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import normalize

FIT_FIRST, FIT_LAST = 11, 100  # ranks of the eigenvalues that the exponent is fitted to
FIT_FEWEST = 10
HISTOGRAM_EDGES = tuple(round(-1.0 + 0.05 * step, 2) for step in range(41))


@dataclass(frozen=True)
class LabelFree:
    """Every number of this file for N images in Q views, by the names of diagnostics.jsonl.

    Attributes:
        embedding_std: See `embedding_std`, of the first two views together.
        effective_rank: See `effective_rank`, of the first two views together.
        alpha_req: See `alpha_req`, of the first two views together; None where the spectrum is too short.
        lidar: See `lidar`, of all views; None for two views, which say too little about an image's scatter.
        alignment: See `alignment`, between the first two views.
        uniformity: See `uniformity`, mean of the first two views.
        pretext_top1: See `pretext_top1`, between the first two views.
        positive_histogram: Counts of cosine similarities between the first two views of an image.
        negative_histogram: Counts between the first view of an image and the second of every other.
        histogram_edges: Edges of their bins.
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

    def known(self) -> dict[str, float | list[int] | list[float]]:
        """What applies, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def label_free(embeddings: Tensor) -> LabelFree:
    """Every number of this file.

    Args:
        embeddings: (N, Q, D), Q >= 2, any norm.
    """
    embeddings = embeddings.detach().to("cpu", torch.float64)
    first, second = embeddings[:, 0], embeddings[:, 1]
    both = torch.cat([first, second])
    positive, negative = similarity_histograms(first, second)
    return LabelFree(
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

    0 when all are one; 1 / sqrt(D) when they are spread evenly over the sphere.

    Args:
        embeddings: (N, D), N >= 2.
    """
    return float(_unit(embeddings).std(dim=0).mean())


def effective_rank(embeddings: Tensor, eps: float = 1e-7) -> float:
    """RankMe (Garrido et al., arXiv:2210.02885, eq. 1): exp of the entropy of the normalised singular values.

    From 1, a single direction, to min(N, D). It grows with N, so only numbers from equally many rows compare.

    Args:
        embeddings: (N, D), neither normalised nor centred.
        eps: Added to each share (the paper's, for float32).
    """
    embeddings = embeddings.double()
    return _exp_entropy(_gram_eigenvalues(embeddings).sqrt(), min(embeddings.shape), eps)


def lidar(embeddings: Tensor, delta: float = 1e-4, eps: float = 1e-7) -> float:
    """LiDAR (Thilak et al., arXiv:2312.04000, section 4): rank of the LDA matrix in which every image is a class.

    With S_b the covariance of the images' means and S_w that of the views around them, plus ``delta`` times the
    identity, it is exp of the entropy of the eigenvalues of S_w^(-1/2) S_b S_w^(-1/2): directions count that tell
    images apart and not views. From 1 to min(N - 1, D).

    Args:
        embeddings: (N, Q, D); the paper takes N = 1000 and Q = 50.
        delta: Keeps S_w invertible; published code has 1e-6 to 1e-3.
        eps: Added to each share.
    """
    embeddings = embeddings.double()
    images, views, width = embeddings.shape
    means = embeddings.mean(dim=1)
    scatter = (embeddings - means[:, None]).flatten(0, 1)
    between = means - means.mean(dim=0)
    if width > images * views:
        # Beyond the rows' span S_b is 0 and S_w the same in every direction: a basis of the span loses nothing.
        basis = torch.linalg.qr(torch.cat([scatter, between]).T).Q
        scatter, between = scatter @ basis, between @ basis
    within = scatter.T @ scatter / (images * views)
    within.diagonal().add_(delta)
    # S_w = L L^T: the eigenvalues of L^(-1) S_b L^(-T) are those of the symmetric form.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), between.T, upper=False)
    return _exp_entropy(_gram_eigenvalues(whitened.T), width, eps)


def alpha_req(embeddings: Tensor) -> float | None:
    """alpha-ReQ (Agrawal et al., NeurIPS 2022): exponent of the power law that the covariance's eigenvalues follow.

    The i-th eigenvalue is about i^(-alpha); the paper finds the best features near alpha = 1. Fitted as its authors'
    code does: log-log, the i-th eigenvalue weighing 1 / i, from the 11th to the 100th.

    Args:
        embeddings: (N, D).

    Returns:
        None if fewer than ten eigenvalues of that range are positive.
    """
    embeddings = embeddings.double()
    eigenvalues = _gram_eigenvalues(embeddings - embeddings.mean(dim=0))
    positive = int((eigenvalues > 1e-12 * eigenvalues[0].clamp(min=1e-30)).sum())
    last = min(FIT_LAST, positive, len(embeddings) - 1)
    if last - FIT_FIRST + 1 < FIT_FEWEST:
        return None
    ranks = torch.arange(FIT_FIRST, last + 1, dtype=torch.float64)
    x, y, weights = ranks.log(), eigenvalues[FIT_FIRST - 1 : last].log(), 1 / ranks
    x_mean, y_mean = (weights @ x) / weights.sum(), (weights @ y) / weights.sum()
    return -float((weights * (x - x_mean)) @ (y - y_mean) / (weights @ (x - x_mean).square()))


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of an image's two views on the unit sphere (Wang & Isola, arXiv:2005.10242, alpha = 2).

    0 when views agree, 2 when they have nothing to do with each other.

    Args:
        first: (N, D).
        second: (N, D), row by row of the same images.
    """
    return float((_unit(first) - _unit(second)).square().sum(dim=1).mean())


def uniformity(embeddings: Tensor) -> float:
    """Log of the mean Gaussian potential of all pairs on the unit sphere (Wang & Isola, arXiv:2005.10242, t = 2).

    0 when all are one point; about -4 (D large) when spread evenly.

    Args:
        embeddings: (N, D), N >= 2.
    """
    return float(torch.pdist(_unit(embeddings)).square().mul(-2).exp().mean().log())


def similarity_histograms(first: Tensor, second: Tensor) -> tuple[list[int], list[int]]:
    """Counts of cosine similarities of positives and of negatives in the bins of `HISTOGRAM_EDGES`.

    Args:
        first: (N, D), one view of each image.
        second: (N, D), another.

    Returns:
        N counts of an image's own two views; N (N - 1) of one image's first and another's second.
    """
    similarity = _similarities(first, second)
    own = torch.eye(len(similarity), dtype=torch.bool)
    return _histogram(similarity[own]), _histogram(similarity[~own])


def pretext_top1(first: Tensor, second: Tensor) -> float:
    """Share of images whose second view is, by cosine, nearer to the first than every other image's second view.

    A tie counts as wrong, so that a collapse scores 0.

    Args:
        first: (N, D).
        second: (N, D), row by row of the same images.
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
    """Squared singular values of (N, D), largest first, min(N, D) of them: those of the smaller Gram matrix."""
    smaller = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    eigenvalues: Tensor = torch.linalg.eigvalsh(smaller)
    return eigenvalues.clamp(min=0).flip(0)


def _exp_entropy(values: Tensor, count: int, eps: float) -> float:
    """exp of the entropy of ``count`` shares; values that are not given are 0."""
    total = float(values.sum())
    if not total > 0:
        return 1.0  # all is one point: as a single direction
    shares = torch.cat([values, values.new_zeros(max(count - len(values), 0))]) / total + eps
    return float((-(shares * shares.log()).sum()).exp())
