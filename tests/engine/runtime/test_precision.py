"""What `precision = "auto"` is, which precision a resumed run has, and float32 with and without TF32."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import small_recipe
from safetensors.torch import load_file
from torch.backends import cuda, cudnn

import sslkit
from sslkit.engine.accelerator import make_accelerator
from sslkit.engine.run_folder.resume import keep_earlier_defaults
from sslkit.engine.runtime.precision import chosen_precision, resolve_precision, restored_backends, set_backends
from sslkit.engine.trainer import train
from sslkit.recipe.resolve import load_recipe, read_tables

EPOCH: dict[str, Any] = {"epochs": 1, "batch_size": 16, "log_every": 1}
COMMON: dict[str, Any] = {"data": {"workers": 0}, "checkpoint": {"every_steps": 1, "every_minutes": 0}}


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, name: str, major: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.parametrize(
    ("name", "major", "chosen", "said"),
    [
        ("NVIDIA H100", 9, "bf16", "precision: bf16 (auto; NVIDIA H100)"),
        ("NVIDIA A100", 8, "bf16", "precision: bf16 (auto; NVIDIA A100)"),
        ("Tesla V100", 7, "no", "precision: float32 (auto; Tesla V100 has no bf16)"),
    ],
)
def test_auto_is_bf16_where_the_gpu_has_it(
    name: str, major: int, chosen: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, name, major)
    resolved = resolve_precision(small_recipe())
    assert resolved.train.precision == chosen
    assert resolved.remarks == (said,)
    assert resolve_precision(resolved) is resolved
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert chosen_precision(small_recipe()) == "no"


@pytest.mark.parametrize("stated", ["no", "bf16", "fp16"])
def test_a_stated_precision_is_kept(stated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "NVIDIA H100", 9)
    recipe = small_recipe(train={"precision": stated})
    assert resolve_precision(recipe) is recipe


def test_every_shipped_recipe_is_auto() -> None:
    for name in ("mocov1_r50", "mocov2_r50", "mocov3_vitb", "simclr_r50", "instdisc_r50", "quickstart"):
        assert load_recipe(name).train.precision == "auto"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "encoder/model.safetensors")


def test_on_a_cpu_auto_is_float32_and_the_run_records_it(tmp_path: Path) -> None:
    for output, stated in (("auto", {}), ("stated", {"precision": "no"})):
        sslkit.train(small_recipe("moco_v2", "test_vit", train={"max_steps": 2, **stated}), tmp_path / output)
    one, other = weights(tmp_path / "auto"), weights(tmp_path / "stated")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_tables(tmp_path / "auto/recipe.toml")["train"]["precision"] == "no"


def test_a_resumed_run_keeps_the_precision_it_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was bf16 on a GPU continues on a CPU, with the same recipe, in bf16."""
    for output, stops, precision in (("whole", (2,), "bf16"), ("resumed", (1, 2), "bf16")):
        for index, stop in enumerate(stops):
            stated = {"max_steps": stop, "precision": "auto" if index else precision}
            sslkit.train(small_recipe("moco_v2", "test_vit", **COMMON | {"train": EPOCH | stated}), tmp_path / output)
    said = capsys.readouterr().out
    assert 'started with [train] precision = "bf16" and keeps it; on this device "auto" is "no", for a new run' in said
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_tables(tmp_path / "resumed/recipe.toml")["train"]["precision"] == "bf16"

    pretend_gpu(monkeypatch, "Tesla V100", 7)
    kept, _ = keep_earlier_defaults(tmp_path / "resumed", small_recipe("moco_v2", "test_vit"))
    assert kept.train.precision == "bf16"


def test_a_run_of_an_earlier_version_stays_in_float32_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipe did not state the precision, whose default was "no"; that of the run does."""
    earlier = small_recipe(train={"precision": "no"})
    (tmp_path / "recipe.toml").write_text(earlier.to_toml())
    pretend_gpu(monkeypatch, "NVIDIA H100", 9)
    kept, messages = keep_earlier_defaults(tmp_path, small_recipe())
    assert kept.as_tables() == earlier.as_tables()
    assert messages == [
        f'{tmp_path}: this run started with [train] precision = "no" and keeps it; on this device "auto" is "bf16", '
        "for a new run"
    ]
    kept, _ = keep_earlier_defaults(tmp_path, small_recipe(train={"precision": "bf16"}))
    assert kept.train.precision == "bf16"  # and is refused as another recipe


def switches() -> tuple[str, ...]:
    return cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision  # type: ignore[attr-defined]


@pytest.fixture
def _same_backends() -> Any:
    with restored_backends():
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["auto", "no", "bf16"])
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.usefixtures("_same_backends")
def test_float32_is_tf32_everywhere_or_nowhere(tf32: bool, precision: str) -> None:
    cuda.matmul.fp32_precision, cudnn.conv.fp32_precision = ("ieee", "tf32") if tf32 else ("tf32", "tf32")  # type: ignore[attr-defined]
    make_accelerator(small_recipe(train={"precision": precision, "tf32": tf32}))
    assert switches() == (("tf32",) * 3 if tf32 else ("ieee",) * 3)
    # The earlier switches, which torch.compile and Accelerate read, do not raise and say the same.
    assert cuda.matmul.allow_tf32 is cudnn.allow_tf32 is tf32
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # type: ignore[attr-defined]  # a CPU's bits


@pytest.mark.usefixtures("_same_backends")
def test_cudnn_measures_its_algorithms_unless_they_must_be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    set_backends(False, "cuda")
    assert cudnn.benchmark
    for device in ("cpu", "mps"):
        set_backends(False, device)
        assert not cudnn.benchmark
    monkeypatch.setattr(cudnn, "deterministic", True)
    set_backends(False, "cuda")
    assert not cudnn.benchmark
    monkeypatch.setattr(cudnn, "deterministic", False)
    torch.use_deterministic_algorithms(True)
    try:
        set_backends(False, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    assert not cudnn.benchmark


@pytest.mark.usefixtures("_same_backends")
@pytest.mark.parametrize("tf32", [False, True])
def test_a_run_leaves_the_callers_switches_as_they_were(tf32: bool, tmp_path: Path) -> None:
    def now() -> tuple[Any, ...]:
        return (*switches(), cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark)

    cudnn.benchmark = True
    before = now()
    seen: list[tuple[str, ...]] = []

    def look(*_args: Any) -> list[str]:
        seen.append(switches())
        return []

    recipe = small_recipe(train={"max_steps": 1, "tf32": tf32})
    train(recipe, tmp_path / "run", advise=look)
    assert seen == [("tf32",) * 3 if tf32 else ("ieee",) * 3]
    assert now() == before


def test_newer_switches_alone_are_restored_too() -> None:
    before = switches()
    with restored_backends():
        cuda.matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            _ = cuda.matmul.allow_tf32
        with restored_backends():
            set_backends(False, "cpu")
            assert switches() == ("ieee",) * 3
        assert switches() == ("tf32", *before[1:])
    assert switches() == before
