"""Weighted k-nearest-neighbour classification of frozen features."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from sslkit.errors import UserError
from sslkit.evaluate.input_checks import check_finite, choose_protocol
from sslkit.evaluate.probes.exact_search import nearest

MAX_VOTE_ELEMENTS = 2**24  # queries x classes at a time
EPSILON = 1e-12  # minimum norm, so that a row of zeros stays zero


@dataclass(frozen=True)
class KnnProtocol:
    """Number and weights of the neighbours.

    Attributes:
        k: Number of neighbours (DINO: 20; InstDisc: 200).
        temperature: The weight of a neighbour is exp(cosine similarity / temperature) (both papers: 0.07).
        centre: Whether to subtract the mean of the bank first. No paper does.
    """

    k: int = 20
    temperature: float = 0.07
    centre: bool = False

    @staticmethod
    def from_name(name: str) -> "list[KnnProtocol]":
        """The protocols of a paper, one for each k that it reports.

        ``dino`` (Caron et al., 2021): k of 10, 20, 100 and 200. ``instdisc`` (Wu et al., 2018): k = 200; the paper
        uses the embedding after the head, this protocol the features.
        """
        neighbours = {"dino": (10, 20, 100, 200), "instdisc": (200,)}
        return [KnnProtocol(k, 0.07) for k in choose_protocol("knn", name, neighbours)]

    def settings(self, *others: dict[str, Any]) -> dict[str, Any]:
        """The settings that a score depends on, with those of readout, preprocessing and data."""
        own: dict[str, Any] = {"kind": "knn", "metric": "cosine", "selection": "none", **vars(self)}
        return {name: value for settings in (own, *others) for name, value in settings.items()}

    def __str__(self) -> str:
        """Name in tables."""
        return f"knn k={self.k} temperature={self.temperature:g}" + (" centred" if self.centre else "")

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < float("inf"):
            raise UserError(f"knn: temperature must be a positive number, not {self.temperature:g}")


def check_neighbours(protocols: Sequence[KnnProtocol], bank_size: int) -> None:
    """Raise `UserError` if a protocol's k is larger than the bank."""
    for protocol in protocols:
        if not 1 <= protocol.k <= bank_size:
            raise UserError(f"knn: k = {protocol.k}, but the bank has {bank_size} images; use --k 1 to {bank_size}")


def predict(
    queries: Tensor, bank: Tensor, labels: Tensor, num_classes: int, protocols: Sequence[KnnProtocol]
) -> list[Tensor]:
    """Predict the class of every query (Q, D) by weighted vote of a bank (N, D), (Q,) for each protocol.

    Neighbours are searched once for all protocols, and once more if only some are centred. Similarities are computed
    in float32. Raises `UserError` if features are not finite, or the bank has fewer than k rows.
    """
    check_neighbours(protocols, len(bank))
    check_finite(bank, "knn, bank")
    check_finite(queries, "knn, queries")
    predicted: dict[KnnProtocol, Tensor] = {}
    for centre in {protocol.centre for protocol in protocols}:
        group = [protocol for protocol in protocols if protocol.centre == centre]
        mean = bank.mean(dim=0, dtype=torch.float32).to(queries.device) if centre else 0.0
        similarity, rows = nearest(queries, bank, max(each.k for each in group), partial(unit_rows, mean))
        for protocol in group:
            predicted[protocol] = vote(similarity, labels.to(queries.device)[rows], num_classes, protocol)
    return [predicted[protocol] for protocol in protocols]


def predict_by_others(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    num_classes: int,
    protocol: KnnProtocol,
    copies: tuple[Tensor, Tensor],
) -> Tensor:
    """Predict the class of every query (Q, D) by the bank's images that are not copies of it, (Q,).

    Args:
        queries: Features of the images to classify; with ``bank`` itself, one is left out at a time.
        bank: (N, D).
        labels: Classes of the bank, (N,).
        num_classes: Number of classes.
        protocol: Number and weights of neighbours. Where fewer are left, these are used.
        copies: A number for each query, (Q,), and for each row of the bank, (N,): equal for copies of an image.
    """
    check_finite(bank, "knn, bank")
    check_finite(queries, "knn, queries")
    of_queries, of_bank = copies
    most = int(torch.unique(of_bank, return_counts=True)[1].max())
    mean = bank.mean(dim=0, dtype=torch.float32) if protocol.centre else 0.0
    similarity, rows = nearest(queries, bank, min(protocol.k + most, len(bank)), partial(unit_rows, mean))
    similarity = similarity.masked_fill(of_bank[rows] == of_queries[:, None], -torch.inf)
    similarity, order = similarity.topk(min(protocol.k, similarity.shape[1]), dim=1)
    return vote(similarity, labels[rows.gather(1, order)], num_classes, protocol)


def unit_rows(mean: Tensor | float, rows: Tensor) -> Tensor:
    """Rows (N, D) minus the mean, of unit length, float32. Rows of zeros stay zero."""
    rows = rows.float() - mean  # a copy, so the next lines may work in place
    # Scaling by powers of two is exact, and the squares of the results neither overflow nor underflow.
    _, exponents = vector_norm(rows, torch.inf, dim=1, keepdim=True).frexp()
    rows.ldexp_(-exponents)
    return rows.div_(vector_norm(rows, dim=1, keepdim=True).clamp_min(EPSILON))


def vote(similarity: Tensor, neighbours: Tensor, num_classes: int, protocol: KnnProtocol) -> Tensor:
    """Class of every query from similarities and classes of its neighbours, (Q, at least k), most similar first."""
    # Subtracting the largest similarity does not change the winner and keeps the exponential finite.
    weights = ((similarity[:, : protocol.k] - similarity[:, :1]).double() / protocol.temperature).exp()
    rows = max(MAX_VOTE_ELEMENTS // num_classes, 1)
    winners = []
    for weight, classes in zip(weights.split(rows), neighbours[:, : protocol.k].split(rows), strict=True):
        votes = weight.new_zeros(len(weight), num_classes)
        winners.append(votes.scatter_add_(1, classes, weight).argmax(dim=1))
    return torch.cat(winners)


def knn_accuracy(
    bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, protocol: KnnProtocol | None = None
) -> float:
    """Accuracy of kNN classification of queries (Q, D) with classes ``truth`` by a bank (N, D) with ``labels``.

    The default protocol is DINO's: k = 20, temperature 0.07. Raises as `predict` does.
    """
    [predicted] = predict(queries, bank, labels, count_classes(labels, truth), [protocol or KnnProtocol()])
    return share_correct(predicted, truth)


def count_classes(*labels: Tensor) -> int:
    """Number of classes, from numbers that start at 0."""
    return int(max(each.max() for each in labels)) + 1


def share_correct(predicted: Tensor, truth: Tensor) -> float:
    """Top-1 accuracy of predicted classes, (N,) both."""
    return share_of(is_correct(predicted, truth))


def is_correct(predicted: Tensor, truth: Tensor) -> Tensor:
    """Whether each predicted class is right, (N,) bool on the CPU."""
    return predicted.cpu() == truth.cpu()


def share_of(correct: Tensor) -> float:
    """Share of True, such as of `is_correct`."""
    return float(correct.float().mean())
