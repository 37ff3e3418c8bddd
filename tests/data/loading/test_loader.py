"""The order of samples: a function of (seed, epoch), whatever the workers, ranks and restarts."""

from itertools import chain

import numpy as np
import pytest
import torch

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.augment.views_config import ViewsConfig
from sslkit.data.loading.loader import make_loader, resolve_workers
from sslkit.data.order.epoch_order import epoch_order
from sslkit.data.order.sampler import GlobalBatchSampler
from sslkit.data.sources.image_source import DataConfig, open_source


def batches(**changes: int) -> list[list[tuple[int, int]]]:
    return list(GlobalBatchSampler(**{"num_samples": 53, "batch_size": 8, "seed": 3, "total_steps": 14, **changes}))


def test_an_epoch_sees_each_sample_at_most_once_and_drops_the_tail() -> None:
    seen = [sample for epoch, sample in chain(*batches()) if epoch == 0]
    assert len(seen) == len(set(seen)) == 48
    assert sorted(epoch_order(3, 0, 53)) == list(range(53))
    assert seen == epoch_order(3, 0, 53)[:48].tolist()
    assert epoch_order(3, 0, 53).tolist() != epoch_order(3, 1, 53).tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_are_parts_of_the_same_global_batches(world_size: int) -> None:
    ranks = [batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == batches()


@pytest.mark.parametrize("start", [1, 5, 6, 13])
def test_a_restart_continues_the_order(start: int) -> None:
    assert batches(start_step=start) == batches()[start:]


def test_workers_change_nothing() -> None:
    source = open_source(DataConfig(path="builtin:fashion_mnist", split="test"))
    views = ViewsConfig.of_policy("moco_v2", size=32)
    seen = []
    for workers in (0, 2):
        order = GlobalBatchSampler(len(source), 16, 0, total_steps=5, start_step=1)
        loader = make_loader(source, ViewPipeline(views, 0), order, workers=workers, pin_memory=False)
        seen.append(list(loader))
    for alone, shared in zip(*seen, strict=True):
        assert torch.equal(alone.sample_ids, shared.sample_ids)
        assert all(torch.equal(a, b) for a, b in zip(alone.views, shared.views, strict=True))
        assert alone.views[0].shape == (16, 32, 32, 3)
        assert alone.views[0].dtype == torch.uint8
    first, second = seen[1][0].views
    assert not torch.equal(first, second)
    crops = np.stack([view.numpy() for batch in seen[1] for view in batch.views])
    assert len({crop.tobytes() for crop in crops.reshape(-1, 32 * 32 * 3)}) == crops.shape[0] * 16


def test_number_of_workers() -> None:
    assert resolve_workers(3, on_accelerator=False, processes_here=1) == 3
    assert resolve_workers("auto", on_accelerator=False, processes_here=10_000) == 0
    assert 1 <= resolve_workers("auto", on_accelerator=True, processes_here=1) <= 16
