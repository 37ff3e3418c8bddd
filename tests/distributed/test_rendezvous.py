"""Processes that a launcher starts again meet in a store that is full of what the dead ones wrote."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from sslkit.distributed.rendezvous import agree_on_prefix, rendezvous_url
from sslkit.errors import RunError

SHORT = timedelta(seconds=0.3)


def names(store: dist.Store, ranks: list[int], processes: int) -> list[str]:
    """What each rank is told, when they come at the same time."""
    together = threading.Barrier(len(ranks))

    def come(rank: int) -> str:
        together.wait()
        return agree_on_prefix(store, rank, processes, timedelta(seconds=20))

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(come, ranks))


def test_every_start_meets_under_a_new_name() -> None:
    store = dist.HashStore()
    seen = []
    for _ in range(5):
        told = names(store, [3, 0, 2, 1], 4)
        assert len(set(told)) == 1
        seen.append(told[0])
    assert len(set(seen)) == 5


def test_a_start_that_came_to_nothing_leaves_no_trap() -> None:
    """Of the first start only 1 came, of the second only 0 and 2; the third finds all they left."""
    store = dist.HashStore()
    with pytest.raises(RunError, match="process 0 did not join"):
        agree_on_prefix(store, 1, 3, SHORT)

    def alone(rank: int) -> str:
        try:
            return agree_on_prefix(store, rank, 3, SHORT)
        except RunError as error:
            return str(error)

    with ThreadPoolExecutor(2) as threads:
        first, other = threads.map(alone, [0, 2])
    assert first.startswith("process 1 did not join")
    told = names(store, [0, 1, 2], 3)
    assert len(set(told)) == 1
    assert told[0] != other


def test_a_process_alone_waits_for_nobody() -> None:
    assert agree_on_prefix(dist.HashStore(), 0, 1, SHORT)


def test_a_launcher_with_a_fresh_store_needs_no_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert rendezvous_url() is None
