"""Data workers that die or hang, really killed and stopped: the same batches come, or one sentence."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from hostile import encode, photo
from PIL import Image

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.augment.views_config import ViewsConfig
from sslkit.data.batch import Batch
from sslkit.data.loading import worker_pool as crew
from sslkit.data.loading.worker_pool import TrainLoader
from sslkit.data.order.sampler import GlobalBatchSampler
from sslkit.data.sources.image_source import DataConfig, ImageSource, open_source
from sslkit.errors import RunError

STEPS = 24


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    for number in range(24):
        (tmp_path / f"{number:02}.png").write_bytes(encode(Image.fromarray(photo(number)), "PNG"))
    return open_source(DataConfig(path=str(tmp_path)))


def loader_of(source: ImageSource, said: list[str], workers: int, timeout: float = 60.0) -> TrainLoader:
    pipeline = ViewPipeline(ViewsConfig.of_policy("moco_v2", size=32), 0)
    order = GlobalBatchSampler(len(source), 4, 0, total_steps=STEPS, start_step=2)
    return TrainLoader(
        source, pipeline, order, workers=workers, pin_memory=False, timeout=timeout, log_message=said.append
    )


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other) == STEPS - 2
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left.sample_ids, right.sample_ids)
        assert all(torch.equal(a, b) for a, b in zip(left.views, right.views, strict=True))


def test_a_killed_worker_costs_no_batch(source: ImageSource) -> None:
    expected = list(loader_of(source, [], workers=0))
    said: list[str] = []
    seen = []
    for batch in loader_of(source, said, workers=2):
        seen.append(batch)
        if len(seen) == 3:
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    assert_same(seen, expected)
    assert len(said) == 1
    assert "process 0: a data worker (process id " in said[0]
    assert " exited with code -9" in said[0]
    assert not multiprocessing.active_children()


def test_a_death_is_not_raised_in_the_middle_of_something_else(source: ImageSource) -> None:
    """torch's own SIGCHLD handler would raise while the optimizer moves the weights."""
    batches = iter(loader_of(source, [], workers=1))
    next(batches)
    worker = multiprocessing.active_children()[0]
    worker.kill()
    worker.join()
    sum(range(1000))  # where it would be raised
    assert len(list(batches)) == STEPS - 3


@pytest.mark.full
def test_a_stopped_worker_is_replaced(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(loader_of(source, [], workers=0))
    said: list[str] = []
    seen = []
    for batch in loader_of(source, said, workers=1, timeout=2.0):
        seen.append(batch)
        if len(seen) == 3:
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGSTOP)
    assert_same(seen, expected)
    assert len(said) == 1
    assert "no batch within [data] worker_timeout = 2 seconds" in said[0]


class HangsAt(ImageSource):
    """A source that never gives one image."""

    def encoded(self, index: int) -> tuple[str, bytes]:
        if index == 7:
            signal.pause()
        return super().encoded(index)

    def without_labels(self) -> "HangsAt":
        return self


@pytest.mark.timeout(120)
def test_an_image_that_hangs_is_named(source: ImageSource) -> None:
    hanging = HangsAt(source.table, "hanging")
    said: list[str] = []
    with pytest.raises(RunError, match=r"hangs at image 7 \(.*07\.png\), 3 times in a row") as caught:
        list(loader_of(hanging, said, workers=2, timeout=1.0))
    assert len(said) == crew.RESTARTS
    assert len(str(caught.value).splitlines()) == 1
    assert not multiprocessing.active_children()


class Slow(HangsAt):
    """A source of which one image takes its time."""

    def encoded(self, index: int) -> tuple[str, bytes]:
        if index == 7:
            signal.sigtimedwait([], 1.5)
        return ImageSource.encoded(self, index)


@pytest.mark.full
def test_a_slow_image_is_waited_for(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "POLL", 0.2)
    said: list[str] = []
    seen = list(loader_of(Slow(source.table, "slow"), said, workers=1))
    assert_same(seen, list(loader_of(source, [], workers=0)))
    assert said == []
