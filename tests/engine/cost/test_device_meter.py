"""MFU, busy share and peak memory, by a clock of our own in place of a GPU's; FLOPs against the textbook's formulas."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_recipe

from sslkit.data.augment.cpu import normalise
from sslkit.engine.cost.device_meter import DeviceMeter
from sslkit.engine.cost.gpu_peaks import CARDS, peak_flops
from sslkit.engine.cost.step_cost import count_step, saved_bytes
from sslkit.engine.logging.throughput import ThroughputMeter
from sslkit.engine.setup import build_method
from sslkit.methods import BatchInfo, Progress

GPU = torch.device("cuda", 0)


class Clock:
    """A device whose time is set by the test, and whose events pass once it has reached them."""

    def __init__(self) -> None:
        self.now, self.done = 0.0, float("inf")

    def event(self) -> "Event":
        return Event(self)


class Event:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def record(self) -> None:
        self.at = self.clock.now

    def query(self) -> bool:
        return self.at <= self.clock.done

    def elapsed_time(self, other: "Event") -> float:
        assert self.query()
        assert other.query()  # CUDA raises otherwise
        return other.at - self.at


def meter_of(clock: Clock, monkeypatch: pytest.MonkeyPatch, **facts: Any) -> DeviceMeter:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: 3 << 29)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: None)
    return DeviceMeter(GPU, make_event=clock.event, **facts)


def make_step(meter: DeviceMeter, clock: Clock, waits: float, computes: float) -> None:
    clock.now += waits
    meter.start_step()
    clock.now += computes
    meter.end_step()


def test_the_busy_share_is_the_time_inside_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    meter = meter_of(clock, monkeypatch)
    make_step(meter, clock, 5.0, 10.0)  # the wait before the first step is not known
    make_step(meter, clock, 2.0, 8.0)
    assert meter.read(1.0)["device_busy"] == pytest.approx(18 / 20)
    make_step(meter, clock, 6.0, 2.0)  # the gap between two windows counts
    assert meter.read(1.0)["device_busy"] == pytest.approx(2 / 8)
    meter.restart()
    clock.now += 1000.0  # an evaluation
    make_step(meter, clock, 0.0, 4.0)
    make_step(meter, clock, 4.0, 4.0)
    assert meter.read(1.0)["device_busy"] == pytest.approx(8 / 12)


def test_steps_that_the_device_has_not_done_are_read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    meter = meter_of(clock, monkeypatch)
    clock.done = 10.0
    make_step(meter, clock, 0.0, 10.0)
    make_step(meter, clock, 5.0, 5.0)
    meter.start_step()  # metrics are written in the middle of a step
    assert meter.read(1.0)["device_busy"] == 1.0
    assert "device_busy" not in meter.read(1.0)
    clock.now += 10.0
    meter.end_step()
    clock.done = 100.0
    assert meter.read(1.0)["device_busy"] == pytest.approx(15 / 20)


def test_mfu_is_the_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, Any] = {"flops": 4_000, "peak": 100_000.0}
    fields = meter_of(Clock(), monkeypatch, **facts).read(10.0)
    assert fields == {"mfu": pytest.approx(0.4), "peak_memory_gib": 1.5}
    assert "mfu" not in meter_of(Clock(), monkeypatch, flops=4_000).read(10.0)  # an unknown card


def test_a_cpu_has_no_fields_of_a_gpu() -> None:
    meter = ThroughputMeter(32)
    assert [*meter.timed([])] == []
    assert set(meter.fields()) == {"images_per_second", "data_wait"}


def test_the_loops_meter_marks_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    meter = ThroughputMeter(32, meter_of(clock, monkeypatch))
    for _ in meter.timed([1, 2, 3]):  # type: ignore[list-item]
        clock.now += 3.0
    assert len(meter.device.steps) == 3
    assert meter.fields()["device_busy"] == 1.0
    meter.restart()
    assert meter.device.read_up_to is None


def test_peaks_of_cards() -> None:
    names: Callable[[str, str], float | None] = lambda card, precision: peak_flops(card, precision, tf32=False)  # noqa: E731
    assert names("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert names("NVIDIA A10", "bf16") == 125e12
    assert names("NVIDIA H100 80GB HBM3", "fp16") == 989.4e12
    assert names("NVIDIA H100 PCIe", "bf16") == 756e12
    assert names("NVIDIA H200", "no") == 67e12
    assert peak_flops("NVIDIA H200", "no", tf32=True) == 494.7e12
    assert names("NVIDIA L4", "bf16") == 121e12
    assert names("NVIDIA GeForce RTX 4090", "bf16") == 165.2e12
    assert names("AMD Instinct MI300X", "bf16") == 1307.4e12
    assert names("Tesla V100-SXM2-32GB", "fp16") == 125e12
    assert names("Tesla V100-SXM2-32GB", "bf16") is None  # emulated
    assert peak_flops("Tesla T4", "no", tf32=True) == 8.1e12  # it has no TF32
    for unknown in ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce GTX 970"):
        assert names(unknown, "bf16") is None
    assert names("NVIDIA GeForce RTX 3090 Ti", "bf16") is None
    for peaks in CARDS.values():  # 16 bits are twice TF32, or more
        assert peaks.tf32 is None or peaks.fp16 >= 1.9 * peaks.tf32 >= 1.9 * peaks.fp32 * 0.99


def flops_of_block(tokens: int, width: int) -> tuple[int, int]:
    """Of a ViT's block, forward and backward, for one image. A multiplication and an addition are two."""
    products = 2 * tokens * width * (3 * width + width + 4 * width + 4 * width)  # qkv, projection, MLP
    attention = 2 * tokens * tokens * width  # of the scores, or of the values
    # Backward: the scores again, as attention does not keep them, then gradients of values, weights, query and key.
    return products + 2 * attention, 2 * products + 5 * attention


@pytest.mark.parametrize(("name", "teacher_views"), [("simclr", 0), ("moco_v3", 2)])
def test_flops_are_those_of_the_layers(name: str, teacher_views: int) -> None:
    """The FLOPs of one more block, from the textbook: two views forward and backward, and the teacher's forward."""
    images, width = 4, 64
    found = []
    for depth in (1, 2):
        args = {"embed_dim": width, "depth": depth, "num_heads": 2}
        recipe = small_recipe(name, "vit_tiny_patch16_224", backbone={"args": args, "name": "vit_tiny_patch16_224"})
        found.append(count_step(recipe, images, low_precision=False).flops)
    forward, backward = flops_of_block(tokens=(32 // 16) ** 2 + 1, width=width)
    assert found[1] - found[0] == images * (2 * (forward + backward) + teacher_views * forward)


def test_recomputation_does_not_count() -> None:
    model: dict[str, Any] = {"args": {"embed_dim": 64, "depth": 1, "num_heads": 2}}
    trains: tuple[dict[str, Any], ...] = {}, {"micro_batch": 8, "activation_checkpointing": True}
    recipes = [small_recipe("simclr", "vit_tiny_patch16_224", train=each) for each in trains]
    recipes = [replace(each, backbone=each.backbone.model_copy(update=model)) for each in recipes]
    assert len({count_step(each, 32, low_precision=False) for each in recipes}) == 1


def test_activations_are_those_that_a_real_step_keeps() -> None:
    recipe, images = small_recipe("moco_v2", "test_resnet", method={"bn_groups": 1}), 8
    counted = count_step(recipe, images, low_precision=False)
    method = build_method(recipe, images).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    method.train()
    views = [torch.zeros(images, 32, 32, 3, dtype=torch.uint8)] * 2
    order = np.arange(images) if method.shuffle_keys else None
    prepare = partial(normalise, mean=recipe.views.mean, std=recipe.views.std)
    with saved_bytes(method) as saved:
        method(views, BatchInfo(torch.arange(images)), Progress(0, 100), order, prepare)
    assert counted.activation_bytes == pytest.approx(sum(saved.values()), rel=0.01)
    half = count_step(recipe, images, low_precision=True).activation_bytes
    assert half < counted.activation_bytes
