"""Weighted k-nearest-neighbour classification of frozen features: exact, in chunks of bounded memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from sslkit.errors import UserError
from sslkit.evaluate.input_checks import check_finite, choose_protocol
from sslkit.progress import stage

QUERY_CHUNK, BANK_CHUNK = 512, 65536  # rows; 1024 and 16384 take 10 % longer
MAX_CHUNK_ELEMENTS = 2**26  # of a chunk of the bank
MAX_VOTE_ELEMENTS = 2**24  # queries x classes at a time
EPSILON = 1e-12  # minimum norm, so that a row of zeros stays zero
GROUP = 64  # columns whose maximum is compared first; see `largest`

Prepare = Callable[[Tensor], Tensor]


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


@torch.no_grad()
def nearest(queries: Tensor, bank: Tensor, k: int, prepare: Prepare = lambda rows: rows) -> tuple[Tensor, Tensor]:
    """Find the k rows of the bank (N, D) with the largest inner products with each query (Q, D), largest first.

    The bank is read once, in chunks, so it may be memory-mapped and larger than memory. ``prepare``, such as a
    normalisation, is applied to chunks of rows of both. Returns similarities (Q, k) and row numbers (Q, k), on the
    queries' device.
    """
    parts = [prepare(chunk) for chunk in queries.split(QUERY_CHUNK)]
    best = [part.new_empty((len(part), 0)) for part in parts]
    rows = [torch.empty((len(part), 0), dtype=torch.long, device=part.device) for part in parts]
    # One buffer for all products: a new one of this size costs a page fault for each of its pages.
    size = max(min(len(bank), BANK_CHUNK, MAX_CHUNK_ELEMENTS // max(bank.shape[1], 1)), 1)
    products = parts[0].new_empty(len(parts[0]) * size)
    with stage("neighbours", len(parts) * -(-len(bank) // size), "chunk") as advance:
        for start in range(0, len(bank), size):
            chunk = prepare(bank[start : start + size].to(queries.device))
            for index, part in enumerate(parts):
                similarity = products[: len(part) * len(chunk)].view(len(part), len(chunk))
                values, columns = largest(_product(part, chunk, similarity), k)
                values, columns = torch.cat([best[index], values], 1), torch.cat([rows[index], columns + start], 1)
                best[index], order = values.topk(min(k, values.shape[1]), dim=1)
                rows[index] = columns.gather(1, order)
                advance(1)
    return torch.cat(best), torch.cat(rows)


def _product(queries: Tensor, chunk: Tensor, out: Tensor) -> Tensor:
    """``queries @ chunk.T`` in ``out``. On CPUs by NumPy, whose BLAS is faster on many (docs/log.md)."""
    if out.device.type != "cpu" or out.dtype != torch.float32:
        return torch.mm(queries, chunk.T, out=out)
    np.matmul(queries.numpy(), chunk.numpy().T, out=out.numpy())
    return out


def largest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row (Q, N), or all if there are fewer, and their columns, largest first.

    They are in the k groups of columns with the largest maxima. Maxima take one pass at memory speed, while topk over
    all columns takes as long as the matrix product.
    """
    groups = similarity.shape[1] // GROUP
    if groups <= 2 * k:
        return similarity.topk(min(k, similarity.shape[1]), dim=1)
    grouped = similarity[:, : groups * GROUP].unflatten(1, (groups, GROUP))
    best = grouped.amax(dim=2).topk(k, dim=1).indices
    columns = (best[:, :, None] * GROUP + torch.arange(GROUP, device=best.device)).flatten(1)
    rest = torch.arange(groups * GROUP, similarity.shape[1], device=best.device).expand(len(similarity), -1)
    columns = torch.cat([columns, rest], dim=1)
    values, positions = similarity.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, positions)


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
        similarity, rows = nearest(queries, bank, max(each.k for each in group), partial(_normalise, mean))
        for protocol in group:
            predicted[protocol] = _vote(similarity, labels.to(queries.device)[rows], num_classes, protocol)
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
    similarity, rows = nearest(queries, bank, min(protocol.k + most, len(bank)), partial(_normalise, mean))
    similarity = similarity.masked_fill(of_bank[rows] == of_queries[:, None], -torch.inf)
    similarity, order = similarity.topk(min(protocol.k, similarity.shape[1]), dim=1)
    return _vote(similarity, labels[rows.gather(1, order)], num_classes, protocol)


def _normalise(mean: Tensor | float, rows: Tensor) -> Tensor:
    rows = rows.float() - mean  # a copy, so the next lines may work in place
    # Scaling by powers of two is exact, and the squares of the results neither overflow nor underflow.
    _, exponents = vector_norm(rows, torch.inf, dim=1, keepdim=True).frexp()
    rows.ldexp_(-exponents)
    return rows.div_(vector_norm(rows, dim=1, keepdim=True).clamp_min(EPSILON))


def _vote(similarity: Tensor, neighbours: Tensor, num_classes: int, protocol: KnnProtocol) -> Tensor:
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
