"""Uploads on a stream of their own, with streams that only write down what is asked of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.augment.device_plan import plan_views
from sslkit.data.augment.gpu import finish_on
from sslkit.data.augment.views_config import ViewsConfig
from sslkit.data.batch import Batch
from sslkit.data.loading.upload import Uploader
from sslkit.data.loading.worker_pool import TrainLoader
from sslkit.data.order.sampler import GlobalBatchSampler
from sslkit.data.sources.image_source import DataConfig, open_source

CPU = torch.device("cpu")


class FakeStream:
    """A stream that writes down what waits for it."""

    log: list[str]

    def __init__(self, name: object = "upload") -> None:
        self.name = name if isinstance(name, str) else "upload"

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened, with CUDA's streams replaced."""
    said: list[str] = []
    computing = FakeStream("compute")
    FakeStream.log = said
    copy = Tensor.to

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        said.append(f"on {stream.name}")
        yield
        said.append(f"off {stream.name}")

    def to(tensor: Tensor, *words: Any, **options: Any) -> Tensor:
        if options.get("non_blocking"):
            said.append("copy")
        return copy(tensor, *words, **options)

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: said.append(f"kept for {stream.name}"))
    return said


def batch_of(config: ViewsConfig) -> Batch:
    pipeline = ViewPipeline(config, 0)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    crops, rows = zip(*(pipeline.crop_views(image, 0, sample) for sample in range(6)), strict=True)
    params = [np.stack(each) for each in zip(*rows, strict=True)]
    views = [torch.from_numpy(np.stack(each)) for each in zip(*crops, strict=True)]
    return Batch(views, torch.arange(6), plan=plan_views(params, pipeline.policies, pipeline.sides))


def test_everything_is_copied_beside_the_compute_stream(log: list[str]) -> None:
    config = ViewsConfig.of_policy("moco_v2", size=32, device="accelerator")
    batch = batch_of(config)
    uploaded = Uploader(CPU)(batch)
    copies = len(batch.views) + 2  # the ids and the plan
    assert log == [
        "on upload",
        *["copy"] * copies,
        "off upload",
        "compute waits for upload",
        *["kept for compute"] * copies,
    ]
    finished, expected = (finish_on(CPU, each, config) for each in (uploaded, batch))
    assert all(torch.equal(one, other) for one, other in zip(finished.views, expected.views, strict=True))


def test_every_tensor_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(id(tensor))
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    batch = batch_of(ViewsConfig.of_policy("moco_v3", size=32, device="accelerator"))
    copied = batch.pin_memory()
    assert sorted(pinned) == sorted(id(each) for each in batch.tensors())
    assert len(pinned) == len(batch.views) + 2
    assert not {id(each) for each in copied.tensors()} & {*pinned}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_uploads_each_batch_once_in_order(log: list[str], workers: int) -> None:
    source = open_source(DataConfig(path="builtin:fashion_mnist"))
    config = ViewsConfig.of_policy("moco_v2", size=32, device="accelerator")

    def loader(upload: Uploader | None) -> TrainLoader:
        order = GlobalBatchSampler(len(source), 4, 0, total_steps=7, start_step=2)
        pipeline = ViewPipeline(config, 0)
        return TrainLoader(source, pipeline, order, workers=workers, pin_memory=False, timeout=60.0, upload=upload)

    expected = list(loader(None))
    assert "on upload" not in log
    seen = list(loader(Uploader(CPU)))
    assert log.count("compute waits for upload") == len(seen) == 5
    for one, other in zip(seen, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


def test_a_batch_is_uploaded_when_it_is_asked_for(log: list[str]) -> None:
    """Not before: an error of a later batch is raised after the steps of earlier ones."""
    source = open_source(DataConfig(path="builtin:fashion_mnist"))
    order = GlobalBatchSampler(len(source), 4, 0, total_steps=3)
    pipeline = ViewPipeline(ViewsConfig.of_policy("moco_v2", size=32), 0)
    batches = iter(TrainLoader(source, pipeline, order, workers=0, pin_memory=False, timeout=0.0, upload=Uploader(CPU)))
    for number in (1, 2, 3):
        next(batches)
        assert log.count("on upload") == number
