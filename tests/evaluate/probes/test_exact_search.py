"""Nearest neighbours against a whole sort, on both ways to search: CPUs collect what is above a threshold, GPUs merge.

Features are small integers, so that similarities are exact and many of them are equal.
"""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn.functional import normalize

from sslkit.evaluate.probes import exact_search
from sslkit.evaluate.probes.exact_search import (
    best_keys,
    best_of_block,
    keys_of,
    nearest,
    nearest_keys,
    rows_of_keys,
    similarities_of,
)


def integers(rows: int, seed: int, width: int = 6) -> Tensor:
    return torch.randint(-3, 4, (rows, width), generator=torch.Generator().manual_seed(seed)).float()


def whole_sort(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Largest first; of equal similarities, the first row first."""
    similarity = queries.double() @ bank.double().T
    order = torch.from_numpy(np.argsort(-similarity.numpy(), axis=1, kind="stable")[:, :k].copy())
    return similarity.gather(1, order).float(), order


@pytest.fixture(params=["collected", "merged"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "merged":  # as on a GPU
        monkeypatch.setattr(exact_search, "_Collected", exact_search._Merged)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("k", [1, 5, 70, 200])
@pytest.mark.parametrize("bank_block", [64, 512, 16384])
def test_blocks_and_ties_are_a_whole_sort(k: int, bank_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_search, "QUERY_BLOCK", 16)
    monkeypatch.setattr(exact_search, "BANK_BLOCK", bank_block)
    monkeypatch.setattr(exact_search, "PRODUCT_BLOCK", 128)
    monkeypatch.setattr(exact_search, "PART_GROUPS", 2)
    bank, queries = integers(2111, 0), integers(37, 1)
    values, rows = nearest(queries, bank, k)
    expected = whole_sort(queries, bank, k)
    assert torch.equal(rows, expected[1])
    assert torch.equal(values, expected[0])


@pytest.mark.usefixtures("way")
def test_similar_rows_that_come_last_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank sorted by class: a whole block is above all thresholds, far more than is collected."""
    monkeypatch.setattr(exact_search, "BANK_BLOCK", 512)
    bank = torch.cat([-integers(600, 0).abs() - 1, integers(1000, 2).abs() + 1])
    queries = integers(9, 1).abs() + 1
    for k in (3, 20):
        assert torch.equal(nearest(queries, bank, k)[1], whole_sort(queries, bank, k)[1])


@pytest.mark.usefixtures("way")
def test_more_neighbours_than_rows_are_all_rows() -> None:
    bank, queries = integers(40, 0), integers(5, 1)
    assert torch.equal(nearest(queries, bank, 50)[1], whole_sort(queries, bank, 40)[1])


@pytest.mark.usefixtures("way")
def test_sklearn_agrees_on_unit_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (normalize(torch.randn(rows, 12, generator=generator)) for rows in (3000, 70))
    reference = NearestNeighbors(n_neighbors=9, algorithm="brute", metric="cosine").fit(bank.numpy())
    found = nearest(queries, bank, 9)
    assert np.array_equal(reference.kneighbors(queries.numpy(), return_distance=False), found[1].numpy())
    torch.testing.assert_close(found[0], (queries @ bank.T).gather(1, found[1]))


def test_parts_of_a_bank_are_merged_to_the_whole() -> None:
    """Rows dealt to three processes, in an order of their own."""
    bank, queries = integers(900, 0), integers(21, 1)
    whole = nearest_keys(queries, bank, torch.arange(900), 30, lambda rows: rows)
    parts = [
        nearest_keys(queries, bank[first::3], torch.arange(first, 900, 3), 30, lambda rows: rows) for first in (2, 0, 1)
    ]
    assert torch.equal(best_keys(torch.cat(parts, dim=1), 30), whole)
    assert torch.equal(rows_of_keys(whole), whole_sort(queries, bank, 30)[1])


@pytest.mark.parametrize(("columns", "k"), [(1000, 3), (64 * 20, 5), (64 * 20 + 1, 9), (130, 1), (40, 50)])
def test_the_best_of_a_block_by_groups_are_a_whole_sort(columns: int, k: int) -> None:
    numbers = torch.randint(0, 30, (7, columns), generator=torch.Generator().manual_seed(columns)).float()
    numbers[:, -1] += torch.arange(7) * 6.0  # the columns beyond the last whole group count too
    keys = best_of_block(numbers, torch.arange(columns) + 5, k)
    order = np.argsort(-numbers.numpy(), axis=1, kind="stable")[:, :k]
    assert np.array_equal(rows_of_keys(keys).numpy(), order + 5)
    assert torch.equal(similarities_of(keys), numbers.gather(1, torch.from_numpy(order.copy())))


def test_keys_have_the_order_of_similarities_then_of_rows() -> None:
    similarity = torch.tensor([-torch.inf, -2.0, -1e-30, -0.0, 0.0, 1e-40, 0.5, 0.5, 3.0, torch.inf])
    rows = torch.tensor([7, 2**32 - 1, 3, 4, 5, 6, 9, 8, 0, 1])
    keys = keys_of(similarity, rows)
    assert torch.equal(similarities_of(keys), similarity)
    assert torch.equal(rows_of_keys(keys), rows)
    assert keys.argsort().tolist() == [0, 1, 2, 4, 3, 5, 6, 7, 8, 9]  # -0.0 and 0.0 are equal; row 4 is before 5
