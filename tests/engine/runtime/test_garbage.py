"""Cyclic garbage is collected between steps, not within one, and automatic collection comes back after a run."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from sslkit.engine.runtime.garbage import EVERY, collect_garbage, collected_between_steps


class Node:
    def __init__(self) -> None:
        self.me = self


def dropped(count: int = 1) -> list["weakref.ref[Node]"]:
    return [weakref.ref(node) for node in [Node() for _ in range(count)]]


@pytest.fixture(autouse=True)
def _automatic() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.enable()
    gc.unfreeze()  # what a command of an earlier test froze
    yield
    (gc.enable if was_on else gc.disable)()


def alive(nodes: list["weakref.ref[Node]"]) -> int:
    return sum(node() is not None for node in nodes)


def test_cycles_wait_for_the_step_that_collects() -> None:
    with collected_between_steps():
        threshold = 20 * gc.get_threshold()[0]
        nodes = dropped(threshold)  # so many that automatic collection would have come
        assert alive(nodes) == threshold
        for step in range(1, EVERY):
            collect_garbage(step)
        assert alive(nodes) == threshold
        collect_garbage(EVERY)
        assert alive(nodes) == 0


def test_memory_is_bounded_over_many_steps() -> None:
    with collected_between_steps():
        seen = []
        most = 0
        for step in range(1, 10 * EVERY + 1):
            seen += dropped()
            most = max(most, alive(seen[-2 * EVERY :]))
            collect_garbage(step)
        assert alive(seen) == 0
        assert most <= EVERY


def test_a_pause_collects_what_has_grown_old_too() -> None:
    with collected_between_steps():
        node = Node()
        old = [weakref.ref(node)]
        for _ in range(3):
            gc.collect(1)  # moves it to the oldest generation
        del node
        collect_garbage(EVERY)
        assert alive(old) == 1
        collect_garbage(1, paused=True)
        assert alive(old) == 0


def test_automatic_collection_is_as_it_was_afterwards() -> None:
    before = gc.get_freeze_count()

    @collected_between_steps()
    def run() -> None:
        assert not gc.isenabled()
        assert gc.get_freeze_count() > before
        raise RuntimeError("a step")

    with pytest.raises(RuntimeError, match="a step"):
        run()
    assert gc.isenabled()
    assert gc.get_freeze_count() == before
    gc.disable()
    with collected_between_steps():
        pass
    assert not gc.isenabled()


def test_what_was_frozen_before_stays_frozen() -> None:
    gc.freeze()
    try:
        with collected_between_steps():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
