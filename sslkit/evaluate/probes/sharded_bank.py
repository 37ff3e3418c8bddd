"""kNN with features that stay where they were computed: each process keeps a shard of the bank on its device.

The shards deal the images of a source in turn: process r has rows r, r + world_size, ... Queries are sent to all
processes in blocks, each finds the nearest rows of its own shard, and their keys are merged.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from sslkit.distributed.collectives import gather_rows, max_over_processes, rank, sum_over_processes, upload, world_size
from sslkit.evaluate.probes.exact_search import NO_KEY, best_keys, nearest_keys, rows_of_keys, similarities_of
from sslkit.evaluate.probes.knn import KnnProtocol, unit_rows, vote

MAX_ROWS, MAX_KEYS = 4096, 2**25  # queries and keys of all processes at a time
MEAN_ROWS = 4096  # rows that are summed in float64 at a time


@dataclass(frozen=True)
class Shard:
    """Features of this process's images of a source.

    Attributes:
        features: (S, D) float32. S is the same on all processes: the last images wrap around.
        readable: Which images of the whole source could be read, (N,) bool on the CPU. Other features have no meaning.
        device: Where to compute; the features may be on the CPU if they do not fit there.
    """

    features: Tensor
    readable: Tensor
    device: torch.device

    def kept(self) -> tuple[Tensor, Tensor]:
        """The features that count, (M, D), and their rows in the source, (M,) on the CPU; each on one process only."""
        rows = rank() + world_size() * torch.arange(len(self.features))
        counts = rows < len(self.readable)
        counts[counts.clone()] = self.readable[rows[counts]]
        if counts.all():
            return self.features, rows
        return self.features[counts.nonzero()[:, 0].to(self.features.device)], rows[counts]

    def is_finite(self) -> bool:
        """Whether the features that count are finite on all processes."""
        kept, _ = self.kept()
        ends = torch.stack(kept.aminmax()) if kept.numel() else kept.new_zeros(2)
        return not bool(max_over_processes((~ends.isfinite()).any().float().to(self.device)) > 0)


def own_images(count: int) -> NDArray[np.int64]:
    """The images of this process among ``count``, as many on all processes."""
    share = -(-count // world_size())
    return (rank() + world_size() * np.arange(share)) % count


def in_order(own: Tensor, count: int) -> Tensor:
    """What all processes have of `own_images`, (S, ...) each, in the order of the source: (count, ...)."""
    return _dealt([gather_rows(own)], count)


def predict_by_shards(
    queries: Shard, bank: Shard, labels: Tensor, num_classes: int, protocol: KnnProtocol, most: int = 0
) -> tuple[Tensor, Tensor]:
    """Predict the class of every query, (Q,), as `predict` does; the same on all processes, which call it together.

    The bank has k or more rows that can be read. ``labels`` are of its whole source, (N,). Also returns the rows of the
    nearest images, (Q, k), or as many as ``most`` if that is more, the nearest first. Both are on the CPU.
    """
    k = min(max(protocol.k, most), count_of(bank.readable))
    features, rows = bank.kept()
    mean = _mean(features, bank).to(bank.device) if protocol.centre else 0.0
    labels = upload(labels, bank.device)
    predicted, nearest_rows = [], []
    size = len(queries.features)
    if world_size() > 1:
        size = max(min(MAX_ROWS // world_size(), MAX_KEYS // (world_size() ** 2 * k)), 1)
    for block in queries.features.split(size):
        asked = gather_rows(block.to(bank.device))
        keys = nearest_keys(asked, features, rows, k, partial(unit_rows, mean))
        keys = pad(keys, (0, k - keys.shape[1]), value=NO_KEY)
        of_shards = gather_rows(keys).unflatten(0, (world_size(), -1))
        best = best_keys(of_shards.transpose(0, 1).flatten(1), k)
        found = rows_of_keys(best).clamp_(max=len(labels) - 1)  # beyond for features that are NaN
        predicted.append(vote(similarities_of(best), labels[found], num_classes, protocol))
        nearest_rows.append(found)
    return tuple(_dealt(blocks, len(queries.readable)).cpu() for blocks in (predicted, nearest_rows))  # type: ignore[return-value]


def _dealt(blocks: list[Tensor], count: int) -> Tensor:
    """Blocks of rows of all processes, (world_size * B, ...) each, in the order of the source."""
    parts = torch.cat([block.unflatten(0, (world_size(), -1)) for block in blocks], dim=1)
    return parts.transpose(0, 1).flatten(0, 1)[:count]


def _mean(features: Tensor, bank: Shard) -> Tensor:
    """Mean of the bank, (D,) float32; summed in float64, so that the number of processes hardly matters."""
    total = features.new_zeros(features.shape[1], dtype=torch.float64)
    for block in features.split(MEAN_ROWS):
        total += block.sum(dim=0, dtype=torch.float64)
    return (sum_over_processes(total.to(bank.device)) / count_of(bank.readable)).float()


def count_of(readable: Tensor) -> int:
    """How many images can be read."""
    return int(readable.sum())
