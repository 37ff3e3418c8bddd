"""`[train] shard` in bf16: two gloo processes against a copy whose weights were cast by hand, and in float32."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import small_recipe
from distributed.test_two_processes import TORCHRUN, run

from sslkit.engine import accelerator as processes
from sslkit.engine.accelerator import make_accelerator

HERE = Path(__file__).parent
PAIRS = ("moco_v3 test_vit", "byol test_vit", "simclr test_resnet")


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    result = run([*TORCHRUN, str(HERE / "low_precision_on_two_ranks.py")])
    assert result.returncode == 0, result.stderr[-3000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.full
@pytest.mark.parametrize("pair", PAIRS)
def test_it_is_the_method_with_weights_in_bf16(found: dict[str, dict[str, Any]], pair: str) -> None:
    numbers = found[pair]
    assert numbers["loss against hand"] < 1e-6
    assert numbers["gradient against hand"] < 1e-6
    # So that the copy tells something: bf16 is another gradient than float32, and still the same direction.
    assert 1e-3 < numbers["gradient against float32"] < 0.5
    assert 1e-6 < numbers["loss against float32"] < 0.3


@pytest.mark.full
@pytest.mark.parametrize("pair", PAIRS)
def test_layers_compute_in_bf16_without_autocast_and_the_rest_is_float32(
    found: dict[str, dict[str, Any]], pair: str
) -> None:
    numbers, seen = found[pair], found[pair]["seen"]
    assert seen.pop("autocast") == ["False"]
    assert numbers["loss dtype"] == "torch.float32"
    assert numbers["shards"] == numbers["gradients"] == ["torch.float32"]
    assert numbers["all sharded"]
    norms = seen.pop("GlobalBatchNorm")
    assert norms == ["torch.float32"]
    assert {dtype for dtypes in seen.values() for dtype in dtypes} == {"torch.bfloat16"}
    assert {"Linear", "Conv2d", "output of GlobalBatchNorm"} <= seen.keys()


@pytest.mark.parametrize(("shard", "started", "autocast"), [(True, 2, "no"), (True, 1, "bf16"), (False, 2, "bf16")])
def test_there_is_no_autocast_around_shards(
    shard: bool, started: int, autocast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class Made:
        def __init__(self, **options: Any) -> None:
            asked.update(options)
            self.device = processes.training_device()

    monkeypatch.setattr(processes, "Accelerator", Made)
    monkeypatch.setattr(processes, "processes_started", lambda: started)
    make_accelerator(small_recipe("moco_v3", "test_vit", train={"shard": shard, "precision": "bf16"}))
    assert asked["mixed_precision"] == autocast
