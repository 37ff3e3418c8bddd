"""Weighted k-nearest-neighbour classification of frozen features: exact, in chunks, in bounded memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from sslkit.errors import UserError, near_miss
from sslkit.evaluate.input_checks import check_finite

QUERY_CHUNK, BANK_CHUNK = 512, 65536  # rows; 1024 and 16384 take a tenth longer
CHUNK_NUMBERS = 2**26  # rows times width of a chunk of the bank
VOTES_AT_ONCE = 2**24  # queries times classes
TINY = 1e-12  # a row of zeros stays one
GROUP = 64  # bank rows of which only the most similar is looked at first

Prepare = Callable[[Tensor], Tensor]


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

    @staticmethod
    def named(name: str) -> "list[KnnProtocol]":
        """A paper's protocol, for every k it reports.

        ``dino`` (Caron et al., 2021): k of 10, 20, 100 and 200, temperature 0.07. ``instdisc`` (Wu et al., 2018):
        k = 200, temperature 0.07; theirs looks at the embedding after the head, this one at the features.
        """
        neighbours = {"dino": (10, 20, 100, 200), "instdisc": (200,)}
        if name not in neighbours:
            raise UserError(f"knn: unknown protocol {name!r}{near_miss(name, neighbours)}; there are dino and instdisc")
        return [KnnProtocol(k, 0.07) for k in neighbours[name]]

    def __str__(self) -> str:
        """Its name in tables."""
        return f"knn k={self.k} temperature={self.temperature:g}" + (" centred" if self.centre else "")

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < float("inf"):
            raise UserError(f"knn: temperature must be a positive number, not {self.temperature:g}")


@torch.no_grad()
def nearest(queries: Tensor, bank: Tensor, k: int, prepare: Prepare = lambda rows: rows) -> tuple[Tensor, Tensor]:
    """The k most similar bank rows of every query, by inner product, most similar first.

    The bank is read once, a chunk at a time, so that it may be memory-mapped and larger than memory; what is held is
    the queries, k similarities of each, and a chunk of queries times a chunk of the bank.

    Args:
        queries: (Q, D).
        bank: (N, D), N >= k.
        k: Neighbours.
        prepare: Applied to chunks of rows of both, such as a normalisation.

    Returns:
        Similarities (Q, k) and bank rows (Q, k), on the queries' device.
    """
    parts = [prepare(chunk) for chunk in queries.split(QUERY_CHUNK)]
    best = [part.new_empty((len(part), 0)) for part in parts]
    rows = [torch.empty((len(part), 0), dtype=torch.long, device=part.device) for part in parts]
    # One buffer for all products: a fresh one of this size costs a page fault for every page of it.
    size = max(min(len(bank), BANK_CHUNK, CHUNK_NUMBERS // max(bank.shape[1], 1)), 1)
    products = parts[0].new_empty(len(parts[0]) * size)
    for start in range(0, len(bank), size):
        chunk = prepare(bank[start : start + size].to(queries.device))
        for index, part in enumerate(parts):
            similarity = products[: len(part) * len(chunk)].view(len(part), len(chunk))
            values, places = largest(_product(part, chunk, similarity), k)
            values, places = torch.cat([best[index], values], dim=1), torch.cat([rows[index], places + start], dim=1)
            best[index], order = values.topk(min(k, values.shape[1]), dim=1)
            rows[index] = places.gather(1, order)
    return torch.cat(best), torch.cat(rows)


def _product(queries: Tensor, chunk: Tensor, out: Tensor) -> Tensor:
    """``queries @ chunk.T`` in ``out``; on CPUs by NumPy, whose BLAS is the faster one on many (docs/log.md)."""
    if out.device.type != "cpu" or out.dtype != torch.float32:
        return torch.mm(queries, chunk.T, out=out)
    np.matmul(queries.numpy(), chunk.numpy().T, out=out.numpy())
    return out


def largest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest numbers of each row (Q, N), or all if there are fewer, and their columns, largest first.

    They lie in the k groups of columns with the largest maxima, and maxima cost a pass at the speed of memory, where
    a search through all columns costs as much as their matrix product.
    """
    groups = similarity.shape[1] // GROUP
    if groups <= 2 * k:
        return similarity.topk(min(k, similarity.shape[1]), dim=1)
    whole = similarity[:, : groups * GROUP].unflatten(1, (groups, GROUP))
    best = whole.amax(dim=2).topk(k, dim=1).indices
    columns = (best[:, :, None] * GROUP + torch.arange(GROUP, device=best.device)).flatten(1)
    rest = torch.arange(groups * GROUP, similarity.shape[1], device=best.device).expand(len(similarity), -1)
    columns = torch.cat([columns, rest], dim=1)
    values, places = similarity.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, places)


def check_neighbours(protocols: Sequence[KnnProtocol], bank: int) -> None:
    """See that each protocol's k is one that a bank of so many images has.

    Raises:
        UserError: It is not.
    """
    for protocol in protocols:
        if not 1 <= protocol.k <= bank:
            raise UserError(f"knn: k = {protocol.k} neighbours of a bank of {bank} images; give --k from 1 to {bank}")


def predict_all(
    queries: Tensor, bank: Tensor, labels: Tensor, num_classes: int, protocols: Sequence[KnnProtocol]
) -> list[Tensor]:
    """What `predict` gives under each protocol; neighbours are looked for once, and once more if some are centred."""
    check_neighbours(protocols, len(bank))
    check_finite(bank, "knn, bank")
    check_finite(queries, "knn, queries")
    predicted: dict[KnnProtocol, Tensor] = {}
    for centre in {protocol.centre for protocol in protocols}:
        alike = [protocol for protocol in protocols if protocol.centre == centre]
        mean = bank.mean(dim=0, dtype=torch.float32).to(queries.device) if centre else 0.0
        unit = partial(_unit, mean)
        similarity, rows = nearest(queries, bank, max(protocol.k for protocol in alike), unit)
        for protocol in alike:
            predicted[protocol] = _vote(similarity, labels.to(queries.device)[rows], num_classes, protocol)
    return [predicted[protocol] for protocol in protocols]


def _unit(mean: Tensor | float, rows: Tensor) -> Tensor:
    rows = rows.float() - mean  # a copy, changed in place from here on
    # Powers of two change no bit of the direction, and squares of what they leave neither overflow nor vanish.
    _, exponents = vector_norm(rows, torch.inf, dim=1, keepdim=True).frexp()
    rows.ldexp_(-exponents)
    return rows.div_(vector_norm(rows, dim=1, keepdim=True).clamp_min(TINY))


def _vote(similarity: Tensor, neighbours: Tensor, num_classes: int, protocol: KnnProtocol) -> Tensor:
    """Class of every query from its most similar neighbours' classes, (Q, at least k), most similar first."""
    # Shifting by the best similarity changes no winner and keeps the exponential finite.
    weights = ((similarity[:, : protocol.k] - similarity[:, :1]).double() / protocol.temperature).exp()
    rows = max(VOTES_AT_ONCE // num_classes, 1)
    winners = []
    for weight, voters in zip(weights.split(rows), neighbours[:, : protocol.k].split(rows), strict=True):
        votes = weight.new_zeros(len(weight), num_classes)
        winners.append(votes.scatter_add_(1, voters, weight).argmax(dim=1))
    return torch.cat(winners)


def predict(queries: Tensor, bank: Tensor, labels: Tensor, num_classes: int, protocol: KnnProtocol) -> Tensor:
    """Class of every query by weighted vote, (Q,).

    Args:
        queries: (Q, D) features.
        bank: (N, D) features, of any precision; similarities are computed in float32.
        labels: (N,) int64 classes of the bank.
        num_classes: Number of classes.
        protocol: How to count.
    """
    return predict_all(queries, bank, labels, num_classes, [protocol])[0]


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

    Raises:
        UserError: Features are not finite, or there are fewer than k.
    """
    num_classes = int(max(labels.max(), truth.max())) + 1
    predicted = predict(queries, bank, labels, num_classes, protocol or KnnProtocol())
    return float((predicted.cpu() == truth.cpu()).float().mean())
