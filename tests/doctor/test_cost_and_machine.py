"""Forecasts, threads, precision, slices, and what the machine says of itself. No timing is asserted."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import small_recipe

from sslkit.data.sources.image_source import ImageSource, open_source
from sslkit.doctor import cost_forecast as cost
from sslkit.doctor import machine_checks as machine
from sslkit.doctor.doctor_setup import DoctorSetup, StepRecord, set_up_checks
from sslkit.doctor.recipe_advice import _slices
from sslkit.engine.cost.step_cost import saved_bytes
from sslkit.engine.setup import build_method
from sslkit.recipe.resolve import Recipe


@pytest.fixture(scope="module")
def source() -> ImageSource:
    return open_source(small_recipe().data).without_labels()


def first_step(recipe: Recipe, source: ImageSource) -> tuple[DoctorSetup, StepRecord]:
    setup = set_up_checks(recipe, source, build_method(recipe, len(source)), lambda _: None)
    return setup, setup.run_step(backward=True)


def bytes_of(sentence: str) -> float:
    """The forecast's first figure."""
    return float(sentence.split("about ")[1].split(" GiB")[0])


def test_memory_grows_with_the_images_at_once(source: ImageSource) -> None:
    figures = {}
    for batch, micro in ((64, 0), (256, 0), (256, 64)):
        recipe = small_recipe("moco_v3", "test_vit", train={"batch_size": batch, "micro_batch": micro})
        figures[batch, micro] = bytes_of(cost.forecast_memory(*first_step(recipe, source)).sentence)
    assert figures[64, 0] < 0.5 * figures[256, 0]
    assert figures[256, 64] == pytest.approx(figures[64, 0], rel=0.05)


def test_what_autograd_keeps_is_counted(source: ImageSource) -> None:
    """A stack of ReLUs on known shapes: each keeps its output, (B, 64) in float32."""
    setup, _ = first_step(small_recipe("simclr", "test_vit"), source)
    with saved_bytes(setup.method) as saved:
        x = torch.randn(8, 64, requires_grad=True)
        y = x.relu().relu().relu()
        y.sum().backward()
    assert sum(saved.values()) == 3 * 8 * 64 * 4


def test_too_little_memory_asks_for_slices(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe("moco_v3", "test_vit", train={"batch_size": 256})
    setup, record = first_step(recipe, source)
    assert cost.forecast_memory(setup, record).verdict == "ok"
    needed = bytes_of(cost.forecast_memory(setup, record).sentence)
    monkeypatch.setattr(cost, "memory_of_device", lambda _: int(needed * (1 << 30) / 2))
    found = cost.forecast_memory(setup, record)
    assert found.verdict == "warning"
    micro = int(found.sentence.split("micro_batch = ")[1].split(",")[0])
    assert 256 % micro == 0
    sliced = small_recipe("moco_v3", "test_vit", train={"batch_size": 256, "micro_batch": micro})
    assert cost.forecast_memory(*first_step(sliced, source)).verdict == "ok"


@pytest.mark.parametrize(("computing", "loading", "verdict"), [(0.01, 0.001, "ok"), (0.001, 0.01, "warning")])
def test_who_waits_for_whom(computing: float, loading: float, verdict: str) -> None:
    found = cost.compare_speeds(small_recipe(data={"workers": 1}), computing, loading, num_images=2000)
    assert found.verdict == verdict
    assert ("Computing waits for data" in found.sentence) == (verdict == "warning")
    assert found.sentence.startswith("62 steps take about ")


@pytest.mark.parametrize(
    ("workers", "threads", "verdict"), [(1, "1", "ok"), (9, "1", "warning"), (1, "64", "warning"), (0, "1", "warning")]
)
def test_threads(workers: int, threads: str, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "cores_of_a_process", lambda _: 2 if workers else 8)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert cost.check_threads(small_recipe(data={"workers": workers})).verdict == verdict


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, precision, verdict in ((True, "bf16", "ok"), (False, "bf16", "warning"), (False, "no", "ok")):
        monkeypatch.setattr(cost, "has_bf16", lambda _, native=native: native)
        assert cost.check_precision(small_recipe(train={"precision": precision})).verdict == verdict
    assert cost.check_precision(small_recipe(train={"precision": "fp16"})).verdict == "warning"


def test_auto_precision_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cost.check_precision(small_recipe())
    assert (found.verdict, found.sentence) == ("ok", "float32 (auto; cpu)")
    of_machine = {finding.check: finding for finding in machine.check_machine()}["precision"]
    assert of_machine.sentence.startswith('"auto" is float32; fp16 needs a GPU; bf16 is ')
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    properties = SimpleNamespace(major=9, total_memory=80 << 30, name="NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: properties)
    assert cost.check_precision(small_recipe()).sentence == "bf16 (auto; NVIDIA H100)"
    of_machine = {finding.check: finding for finding in machine.check_machine()}["precision"]
    assert of_machine.sentence == '"auto" is bf16; fp16 is there too'


def test_the_memory_forecast_is_of_the_chosen_precision(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with bf16 a recipe that does not state the precision needs what a recipe of bf16 needs."""
    monkeypatch.setattr(cost, "memory_of_device", lambda _device: 80 << 30)
    setup, record = first_step(small_recipe("moco_v3", "test_vit"), source)

    def forecast(**train: str) -> str:
        recipe = small_recipe("moco_v3", "test_vit", train={"batch_size": 512, **train})
        return cost.forecast_memory(replace(setup, recipe=recipe), record).sentence

    assert forecast() == forecast(precision="no") != forecast(precision="bf16")
    monkeypatch.setattr(cost, "chosen_precision", lambda _recipe: "bf16")
    assert forecast() == forecast(precision="bf16")


@pytest.mark.parametrize(
    ("name", "model", "micro", "verdict"),
    [
        ("moco_v3", "test_vit", 8, "ok"),
        ("moco_v3", "test_resnet", 0, "ok"),
        ("moco_v2", "test_resnet", 8, "ok"),
        ("moco_v3", "test_resnet", 8, "warning"),
        ("simclr", "test_resnet", 8, "warning"),
        ("moco_v2", "test_resnet", 4, "warning"),
    ],
)
def test_slices(name: str, model: str, micro: int, verdict: str, source: ImageSource) -> None:
    recipe = small_recipe(name, model, train={"micro_batch": micro})
    assert _slices(recipe, build_method(recipe, len(source))).verdict == verdict


def test_the_machine_is_described() -> None:
    findings = {finding.check: finding for finding in machine.check_machine()}
    assert "torch" in findings["versions"].sentence
    assert "timm" in findings["versions"].sentence
    assert "GiB" in findings["memory"].sentence
    assert findings["GPU"].sentence == "none: training runs on the CPU"
    assert not [finding for finding in findings.values() if "could not be checked" in finding.sentence]


def test_what_is_wrong_with_a_machine_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "999")
    real = machine.importlib.metadata.version
    monkeypatch.setattr(
        machine.importlib.metadata, "version", lambda name: "2.0" if name == "albumentationsx" else real(name)
    )

    def mismatch(_name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(machine.importlib, "import_module", mismatch)
    monkeypatch.setattr(machine.os, "statvfs", lambda _: machine.os.statvfs_result((4096, 4096, 16384, *[0] * 7)))
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    warned = {finding.check for finding in machine.check_machine() if finding.verdict == "warning"}
    assert warned == {"threads", "albumentations", "torchvision", "shared memory"}
