"""Exact nearest neighbours by inner product, in blocks of bounded memory.

A neighbour is a 64-bit key: the similarity, then the row, so that the largest key is the most similar row, and of equal
similarities the one with the lowest number. Keys of parts of a bank are merged by `best_keys`, in any order.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from sslkit.distributed.collectives import upload
from sslkit.evaluate.features.devices import exact_products, free_bytes
from sslkit.progress import stage

QUERY_BLOCK, BANK_BLOCK, PRODUCT_BLOCK = 512, 16384, 1024  # rows, on CPUs; a product's last rows, which fit a cache
DEVICE_QUERY_BLOCK, DEVICE_BLOCK_ELEMENTS = 2048, 2**27  # on GPUs: rows, and products of a block
BYTES_PER_PRODUCT = 32  # at most, with maxima and keys
GROUP, FINE_GROUP = 64, 8  # columns whose maximum is compared first
PART_GROUPS = PRODUCT_BLOCK // GROUP
ROW_BITS = 32
LAST_ROW = 2**ROW_BITS - 1
NO_KEY = torch.iinfo(torch.int64).min  # below all keys

Prepare = Callable[[Tensor], Tensor]


@torch.no_grad()
def nearest(queries: Tensor, bank: Tensor, k: int, prepare: Prepare = lambda rows: rows) -> tuple[Tensor, Tensor]:
    """Find the k rows of the bank (N, D) with the largest inner products with each query (Q, D), largest first.

    Of equal rows the first ones are found. The bank is read once, in blocks, so it may be memory-mapped and larger than
    memory. ``prepare``, such as a normalisation, is applied to blocks of rows of both. Returns similarities (Q, k) and
    row numbers (Q, k), on the queries' device.
    """
    keys = nearest_keys(queries, bank, torch.arange(len(bank)), k, prepare)
    return similarities_of(keys), rows_of_keys(keys).clamp_(max=len(bank) - 1)  # beyond for features that are NaN


@torch.no_grad()
def nearest_keys(queries: Tensor, bank: Tensor, rows: Tensor, k: int, prepare: Prepare) -> Tensor:
    """The keys of the k nearest rows, (Q, min(k, N)), largest first, on the queries' device.

    ``rows`` (N,) are the numbers that the rows of the bank have in the keys, ascending. Otherwise as `nearest`.
    """
    device = queries.device
    query_block, bank_block = _block_sizes(device, len(queries), len(bank))
    parts = [prepare(block).float() for block in queries.split(query_block)]
    kind = _Collected if device.type == "cpu" else _Merged
    found = [kind(part, k) for part in parts]
    # One buffer for all products: a new one of this size costs a page fault for each of its pages.
    buffer = torch.empty(query_block * bank_block, device=device)
    rows = upload(rows, device)
    with stage("neighbours", len(parts) * -(-len(bank) // bank_block), "block") as advance, exact_products():
        for start in range(0, len(bank), bank_block):
            block = prepare(bank[start : start + bank_block].to(device, non_blocking=True)).float()
            for neighbours in found:
                neighbours.add(block, rows[start : start + bank_block], buffer)
                advance(1)
    return torch.cat([neighbours.keys() for neighbours in found])


def _block_sizes(device: torch.device, queries: int, bank: int) -> tuple[int, int]:
    """Rows of queries and of the bank in a block, by what the device has free; of the bank, whole groups."""
    on_cpu = device.type == "cpu"
    query_block = max(min(QUERY_BLOCK if on_cpu else DEVICE_QUERY_BLOCK, queries), 1)
    elements = min(DEVICE_BLOCK_ELEMENTS, free_bytes(device) // 2 // BYTES_PER_PRODUCT)
    bank_block = BANK_BLOCK if on_cpu else elements // query_block
    return query_block, max(min(bank_block, bank + GROUP) // GROUP, 1) * GROUP


class _Merged:
    """The nearest rows found so far of some queries (Q, D). It never waits for the device."""

    def __init__(self, queries: Tensor, k: int) -> None:
        self.queries, self.k = queries, k
        self.best = torch.empty((len(queries), 0), dtype=torch.long, device=queries.device)

    def add(self, block: Tensor, rows: Tensor, buffer: Tensor) -> None:
        """Look at a block (B, D) of the bank, whose rows have these numbers, above those before."""
        products = buffer[: len(self.queries) * len(block)].view(-1, len(block))
        torch.mm(self.queries, block.T, out=products)
        self.best = best_keys(torch.cat([self.best, best_of_block(products, rows, self.k)], dim=1), self.k)

    def keys(self) -> Tensor:
        """The keys of the nearest rows, largest first."""
        return self.best


class _Products:
    """Products of queries (Q, D) and a block (B, D), and the maxima (Q, G) of groups of columns.

    By NumPy, whose BLAS is faster on many CPUs (docs/log.md). Columns that fill the last group are -inf.
    """

    def __init__(self, queries: Tensor, block: Tensor, buffer: Tensor) -> None:
        missing = -len(block) % GROUP
        block = pad(block, (0, 0, 0, missing)) if missing else block
        self.parts: list[Tensor] = []
        self.maxima = torch.empty(len(queries), len(block) // GROUP)
        self.buffer = buffer
        for rows, maxima in zip(block.split(PRODUCT_BLOCK), self.maxima.split(PART_GROUPS, dim=1), strict=True):
            start = len(self.parts) * PRODUCT_BLOCK * len(queries)
            part = buffer[start : start + len(queries) * len(rows)].view(len(queries), len(rows))
            np.matmul(queries.numpy(), rows.numpy().T, out=part.numpy())
            self.parts.append(part)
            if missing and len(self.parts) * PRODUCT_BLOCK >= len(block):
                part[:, -missing:] = -torch.inf
            torch.amax(part.unflatten(1, (-1, GROUP)), dim=2, out=maxima)

    def fine_maxima(self) -> Tensor:
        """Maxima of smaller groups, of which there are more."""
        return torch.cat([part.unflatten(1, (-1, FINE_GROUP)).amax(dim=2) for part in self.parts], dim=1)

    def of_groups(self, queries: Tensor, groups: Tensor) -> Tensor:
        """Products (M, GROUP) of some queries with some groups, (M,) both."""
        count, total = self.maxima.shape
        last = total - total % PART_GROUPS
        width = torch.where(groups < last, PART_GROUPS, total - last)  # groups of the part that it is in
        within = groups % PART_GROUPS
        rows = (groups - within) * count + queries * width + within
        return self.buffer[: count * total * GROUP].view(-1, GROUP).index_select(0, rows)


class _Collected:
    """The same, quicker on CPUs: only products above a query's threshold are looked at.

    They are collected, and counted now and then; the threshold is the k-th best product then. Maxima of groups of
    columns are taken while the products are in the cache, and nearly no group has one above the threshold.
    """

    def __init__(self, queries: Tensor, k: int) -> None:
        self.queries, self.k, self.seen = queries, k, 0
        self.collected = torch.full((len(queries), max(3 * k, k + GROUP)), NO_KEY)
        self.counts = torch.zeros(len(queries), dtype=torch.long)
        self.threshold = torch.full((len(queries), 1), -torch.inf)

    def add(self, block: Tensor, rows: Tensor, buffer: Tensor) -> None:
        """Look at a block (B, D) of the bank, whose rows have these numbers, above those before."""
        products = _Products(self.queries, block, buffer)
        fits = self.seen >= self.k and self._collect(products, rows)
        if not fits and self.k <= len(block) // FINE_GROUP:
            self._raise(products.maxima if self.k <= products.maxima.shape[1] else products.fine_maxima())
            if self.seen >= self.k:
                self._count(self.collected[:, :0])
            fits = self._collect(products, rows)
        if not fits:
            self._count(best_of_block(torch.cat(products.parts, dim=1)[:, : len(block)], rows, self.k))
        self.seen += len(block)

    def keys(self) -> Tensor:
        """The keys of the nearest rows, largest first."""
        return best_keys(self.collected, min(self.k, self.seen))

    def _raise(self, maxima: Tensor) -> None:
        """Raise the thresholds just below the k-th largest maximum (Q, G): k products are as large."""
        own = maxima.topk(self.k, dim=1).values[:, -1:]
        self.threshold = torch.maximum(self.threshold, own.nextafter(own.new_tensor(-torch.inf)))

    def _collect(self, products: _Products, rows: Tensor) -> bool:
        """Collect what is above the thresholds; False if that is too much. A later row that equals one is none."""
        queries, groups = (products.maxima > self.threshold).nonzero(as_tuple=True)
        values = products.of_groups(queries, groups)
        places, columns = (values > self.threshold[queries]).nonzero(as_tuple=True)
        queries = queries[places]
        counts = queries.bincount(minlength=len(self.queries))
        if int((self.counts + counts).max()) > self.collected.shape[1]:
            return False
        keys = keys_of(values[places, columns], rows[groups[places] * GROUP + columns])
        own = torch.arange(len(queries)) - (counts.cumsum(0) - counts)[queries]
        self.collected[queries, self.counts[queries] + own] = keys
        self.counts += counts
        return True

    def _count(self, keys: Tensor) -> None:
        """Keep the k best of what was collected and of ``keys`` (Q, M)."""
        best = best_keys(torch.cat([self.collected, keys], dim=1), self.k)
        self.counts = (best > NO_KEY).sum(dim=1)
        self.collected[:, : self.k], self.collected[:, self.k :] = best, NO_KEY
        self.threshold = self.threshold.fmax(similarities_of(best[:, -1:]))  # NaN if there are fewer


def best_of_block(products: Tensor, rows: Tensor, k: int) -> Tensor:
    """The k largest keys of products (Q, B) with rows (B,) that have these numbers, or all; largest first.

    They are in the k groups of columns with the largest maxima, of equal ones the first. Maxima take one pass at
    memory speed, while topk over all columns takes as long as the matrix product.
    """
    groups = products.shape[1] // GROUP
    if groups <= 2 * k:
        return best_keys(keys_of(products, rows), k)
    grouped = products[:, : groups * GROUP].unflatten(1, (groups, GROUP))
    numbers = torch.arange(groups, device=rows.device)
    best = rows_of_keys(best_keys(keys_of(grouped.amax(dim=2), numbers), k))
    columns = (best[:, :, None] * GROUP + torch.arange(GROUP, device=rows.device)).flatten(1)
    rest = torch.arange(groups * GROUP, products.shape[1], device=rows.device).expand(len(products), -1)
    columns = torch.cat([columns, rest], dim=1)
    return best_keys(keys_of(products.gather(1, columns), rows[columns]), k)


def best_keys(keys: Tensor, k: int) -> Tensor:
    """The k largest of each row of keys (Q, M), or all, largest first."""
    best: Tensor = keys.topk(min(k, keys.shape[1]), dim=1).values
    return best


def keys_of(similarities: Tensor, rows: Tensor) -> Tensor:
    """The keys of float32 similarities and the numbers of rows, below 2 ** 32; shapes are broadcast."""
    bits = (similarities + 0.0).view(torch.int32)  # -0.0 becomes 0.0, which it equals
    keys: Tensor = (_flip(bits).long() << ROW_BITS) + (LAST_ROW - rows)
    return keys


def similarities_of(keys: Tensor) -> Tensor:
    """The similarities in keys, float32."""
    return _flip((keys >> ROW_BITS).int()).view(torch.float32)


def rows_of_keys(keys: Tensor) -> Tensor:
    """The numbers of rows in keys."""
    rows: Tensor = LAST_ROW - (keys & LAST_ROW)
    return rows


def _flip(bits: Tensor) -> Tensor:
    """Between the bits of float32 numbers and integers of the same order."""
    flipped: Tensor = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return flipped
