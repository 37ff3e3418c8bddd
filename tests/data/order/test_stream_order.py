"""The order of a stream: nothing lost, nothing twice, the same for any number of readers, few row groups at a time."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslkit.data.order.sampler import GlobalBatchSampler
from sslkit.data.order.stream_order import StreamOrder

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def samples(batches: GlobalBatchSampler) -> list[list[int]]:
    return [[sample for _, sample in batch] for batch in batches]


@settings(max_examples=150, deadline=None)
@given(sizes=SIZES, buffer=st.integers(1, 600), batch=st.integers(1, 64), seed=st.integers(0, 5))
def test_an_epoch_has_every_image_once_but_those_short_of_a_batch(
    sizes: list[int], buffer: int, batch: int, seed: int
) -> None:
    total = sum(sizes)
    batch = min(batch, total)
    steps = total // batch
    order = StreamOrder(tuple(sizes), buffer).epoch(seed, 0, 0, batch)
    taken = np.concatenate([order.batch(step, 0, batch)[0] for step in range(steps)])
    assert len(set(taken.tolist())) == len(taken) == steps * batch
    assert 0 <= taken.min() <= taken.max() < total


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_batches_depend_on_seed_and_epoch_alone(world: int) -> None:
    """Not on how many processes there are, nor on where a run began."""
    plan = StreamOrder((7, 30, 12, 25, 9, 40, 21, 18) * 4, 160)

    def batches(**changes: int) -> list[list[int]]:
        return samples(GlobalBatchSampler(648, 48, changes.pop("seed", 3), total_steps=30, plan=plan, **changes))

    whole = batches()
    ranks = [batches(rank=rank, world_size=world) for rank in range(world)]
    assert [[sample for part in parts for sample in part] for parts in zip(*ranks, strict=True)] == whole
    assert batches(start_step=17) == whole[17:]
    assert whole[:13] != whole[13:26]
    assert batches(seed=4) != whole
    assert batches(order_variant=1) != whole


def reads(plan: StreamOrder, batch: int, world: int, workers: int, rank: int, worker: int) -> list[int]:
    """Row groups that a worker fetches in an epoch, with as many kept as it is told to keep."""
    held: OrderedDict[int, int] = OrderedDict()
    room, fetched = plan.groups_held(batch, world, workers), []
    steps = sum(plan.sizes) // batch
    keys = samples(
        GlobalBatchSampler(sum(plan.sizes), batch, 0, rank=rank, world_size=world, total_steps=steps, plan=plan)
    )
    for mine in keys[worker::workers]:
        for group in np.searchsorted(plan.starts, mine, side="right") - 1:
            if group not in held:
                fetched.append(int(group))
            left = held.pop(group, plan.sizes[group]) - 1
            if left:
                held[group] = left
            if len(held) > room:
                held.popitem(last=False)
    return fetched


@pytest.mark.full
@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 4), (2, 2), (4, 2), (2, 3)])
def test_processes_and_workers_read_row_groups_of_their_own(world: int, workers: int) -> None:
    plan, batch = StreamOrder((100,) * 640, 6400), 64
    width, cycle = plan.interleave(batch).width, plan.interleave(batch).cycle
    assert (width, cycle) == (8, 8)
    everyone = [reads(plan, batch, world, workers, r, w) for r in range(world) for w in range(workers)]
    fetched = sum(map(len, everyone))
    # Segments begin and end within a group, which two readers need then; 3 workers do not divide a cycle of 8 batches.
    segments, shared = width * cycle, 1 if cycle % workers == 0 else workers
    assert fetched <= (640 + 2 * segments) * shared
    if shared == 1:
        assert max(map(len, everyone)) <= fetched / (world * workers) * 1.1


def test_images_of_a_batch_are_of_many_groups() -> None:
    """In files sorted by class, where a group is of one class, a batch must not be."""
    plan = StreamOrder((100,) * 640, 6400)
    order = plan.epoch(0, 0, 0, 64)
    groups = [len(set((order.batch(step, 0, 64)[0] // 100).tolist())) for step in range(1000)]
    assert min(groups) >= 8


def test_a_buffer_for_all_images_mixes_them_all() -> None:
    stream = StreamOrder((64,), 64)
    assert stream.interleave(16).window == 64
    epoch = stream.epoch(0, 0, 0, 16)
    order = np.concatenate([epoch.batch(step, 0, 16)[0] for step in range(4)])
    assert sorted(order.tolist()) == list(range(64))
    assert np.corrcoef(order, np.arange(64))[0, 1] < 0.4
