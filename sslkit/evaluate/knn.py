"""Weighted k-nearest-neighbour classification of frozen features: exact, in chunks, in bounded memory."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslkit.errors import UserError

QUERY_CHUNK, BANK_CHUNK = 1024, 16384


@dataclass(frozen=True)
class KnnProtocol:
    """How neighbours are found and counted.

    Attributes:
        k: Neighbours (DINO's protocol: 20; InstDisc's: 200).
        temperature: A neighbour's vote weighs exp(cosine similarity / temperature); 0.07 in both.
        centre: Whether the bank's mean is subtracted first; the papers do not.
    """

    k: int = 20
    temperature: float = 0.07
    centre: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < float("inf"):
            raise UserError(f"knn: temperature must be a positive number, not {self.temperature:g}")


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar bank rows of every query, by inner product, most similar first.

    Never holds more than a chunk of queries times a chunk of the bank.

    Args:
        queries: (Q, D).
        bank: (N, D), N >= k.
        k: Neighbours.

    Returns:
        Similarities (Q, k) and bank rows (Q, k).
    """
    similarities, rows = [], []
    for chunk in queries.split(QUERY_CHUNK):
        best = chunk.new_full((len(chunk), 0), 0.0)
        best_rows = torch.empty((len(chunk), 0), dtype=torch.long, device=chunk.device)
        for start in range(0, len(bank), BANK_CHUNK):
            part = chunk @ bank[start : start + BANK_CHUNK].T
            values, index = part.topk(min(k, part.shape[1]), dim=1)
            best = torch.cat([best, values], dim=1)
            best_rows = torch.cat([best_rows, index + start], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            best_rows = best_rows.gather(1, order)
        similarities.append(best)
        rows.append(best_rows)
    return torch.cat(similarities), torch.cat(rows)


def predict(queries: Tensor, bank: Tensor, labels: Tensor, num_classes: int, protocol: KnnProtocol) -> Tensor:
    """Class of every query by weighted vote, (Q,).

    Args:
        queries: (Q, D) features.
        bank: (N, D) features.
        labels: (N,) int64 classes of the bank.
        num_classes: Number of classes.
        protocol: How to count.
    """
    if not 1 <= protocol.k <= len(bank):
        raise UserError(f"knn: k = {protocol.k} neighbours of a bank of {len(bank)} images; k must be within 1 and it")
    if protocol.centre:
        mean = bank.mean(dim=0)
        queries, bank = queries - mean, bank - mean
    similarity, rows = nearest(normalize(queries, dim=1), normalize(bank, dim=1), protocol.k)
    votes = torch.zeros(len(queries), num_classes, device=queries.device, dtype=torch.float64)
    # Shifting by the best similarity changes no winner and keeps the exponential finite.
    weights = ((similarity - similarity[:, :1]).double() / protocol.temperature).exp()
    votes.scatter_add_(1, labels.to(queries.device)[rows], weights)
    return votes.argmax(dim=1)


def knn_accuracy(
    bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, protocol: KnnProtocol | None = None
) -> float:
    """Share of queries classified right.

    Args:
        bank: (N, D) features of the training images.
        labels: (N,) int64.
        queries: (Q, D) features of the test images.
        truth: (Q,) int64.
        protocol: Defaults to DINO's: cosine, k = 20, temperature 0.07.
    """
    num_classes = int(max(labels.max(), truth.max())) + 1
    predicted = predict(queries, bank, labels, num_classes, protocol or KnnProtocol())
    return float((predicted.cpu() == truth.cpu()).float().mean())
