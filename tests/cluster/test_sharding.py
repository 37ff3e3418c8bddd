"""Weights in parts (FSDP2) against whole copies (DDP): two gloo processes, a tiny ViT."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_recipe
from launching import finish, pretrain, start, tensors, write_recipe

from sslkit.errors import UserError
from sslkit.evaluate import load_encoder
from sslkit.files.jsonl_reader import read_lines

STEPS, NOISE = 6, 1e-9
TABLES: dict[str, dict[str, Any]] = {
    "train": {"max_steps": STEPS, "batch_size": 16, "clip_norm": 0.5},
    "optim": {"name": "adamw", "lr": 0.005, "weight_decay": 0.1},
    "checkpoint": {"every_steps": 3, "keep": 2},
    "monitor": {"diagnose_every": 2, "every_epochs": 1, "data": "builtin:fashion_mnist", "max_train": 500},
    "guard": {"compare_every": 2},
}


def train(folder: Path, output: str, processes: int, resume: str = "auto", method: str = "moco_v3", **more: Any) -> str:
    (folder / f"of-{output}").mkdir()
    recipe = write_recipe(folder / f"of-{output}", method, "test_vit", **TABLES | {"train": TABLES["train"] | more})
    process = start([*pretrain(recipe, folder / output), "--resume", resume], processes=processes)
    said = finish(process)
    assert process.returncode == 0, said
    return said


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_lines(run / "metrics.jsonl")]


def assert_close(one: Path, other: Path, *, exact: bool = False) -> None:
    """A bias ahead of BatchNorm is left out: its gradient is rounding alone, of which AdamW makes whole steps."""
    mine, theirs = tensors(one, STEPS), tensors(other, STEPS)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        tolerance = 0.0 if exact else 2e-5
        gradient = mine.get(f"{name}/exp_avg")
        noise = gradient is not None and not exact and float(gradient.abs().max()) < NOISE
        if "running" not in name and not noise:
            torch.testing.assert_close(theirs[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    said = train(folder, "whole", 2)
    assert "sharded" not in said
    said = train(folder, "parts", 2, shard=True)
    found = re.search(r"sharded: (\d+) of (\d+) on this process", said)
    assert found, said
    assert 0.49 < int(found[1]) / int(found[2]) < 0.53
    return folder


@pytest.mark.full
def test_it_trains_as_whole_copies_do(runs: Path) -> None:
    assert_close(runs / "whole", runs / "parts")
    rows = [read_lines(runs / run / "metrics.jsonl") for run in ("whole", "parts")]
    for mine, theirs in zip(*rows, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-4)
    assert max(row["grad_norm"] for row in rows[0]) > TABLES["train"]["clip_norm"]  # so that clipping was at work
    lines = [read_lines(runs / run / "diagnostics.jsonl") for run in ("whole", "parts")]
    for mine, theirs in zip(*lines, strict=True):
        assert theirs["effective_rank"] == pytest.approx(mine["effective_rank"], rel=1e-3)


@pytest.mark.full
def test_the_monitor_scores_alike(runs: Path) -> None:
    one, other = (read_lines(runs / run / "results.jsonl") for run in ("whole", "parts"))
    assert [row["step"] for row in one] == [row["step"] for row in other] == [STEPS]
    assert other[0]["accuracy"] == pytest.approx(one[0]["accuracy"], abs=0.003)
    assert one[0]["protocol_hash"] == other[0]["protocol_hash"]


def test_the_encoder_is_the_checkpoints(runs: Path) -> None:
    encoders = [load_encoder(str(runs / run)) for run in ("whole", "parts")]
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    one, other = (encoder.module.eval()(images) for encoder in encoders)
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "processes", "shard"),
    [("whole", 2, True), ("parts", 2, False), ("parts", 2, True), ("parts", 1, False), ("whole", 1, True)],
)
def test_checkpoints_are_interchangeable(runs: Path, source: str, processes: int, shard: bool, tmp_path: Path) -> None:
    checkpoint = runs / source / "checkpoints/step-00000003"
    train(tmp_path, "run", processes, resume=str(checkpoint), shard=shard)
    assert losses(tmp_path / "run") == pytest.approx(losses(runs / "whole")[3:], rel=1e-4)
    same = processes == 2 and shard == (source == "parts")
    assert_close(runs / source, tmp_path / "run", exact=same)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["byol", "simclr"])
def test_other_methods_train_as_whole_copies_do(method: str, tmp_path: Path) -> None:
    train(tmp_path, "whole", 2, method=method)
    train(tmp_path, "parts", 2, method=method, shard=True)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert_close(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"activation_checkpointing": True}, {"precision": "bf16"}], ids=str)
def test_it_goes_with_other_switches(runs: Path, more: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path, "parts", 2, shard=True, **more)
    if "precision" in more:
        train(tmp_path, "whole", 2, **more)
        # Whole copies keep a ViT's LayerNorm and residual sums in float32, shards do not. AdamW makes steps of it.
        one, other = losses(tmp_path / "whole"), losses(tmp_path / "parts")
        assert other[0] == pytest.approx(one[0], rel=1e-3)
        assert other == pytest.approx(one, rel=0.2)
    else:
        assert_close(runs / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({"train": {"precision": "fp16"}}, "precision = 'fp16'; take bf16"),
        ({"train": {"compile": True}}, r"\[train\] compile"),
        ({"train": {"micro_batch": 8}}, r"\[train\] micro_batch"),
        ({"optim": {"name": "lars", "lr": 0.1, "weight_decay": 0.0}}, "name = 'lars'; take adamw or sgd"),
        ({"monitor": {"layer_gradients": True}}, "layer_gradients"),
    ],
)
def test_what_it_does_not_go_with(tables: dict[str, dict[str, Any]], sentence: str) -> None:
    tables = {**tables, "train": {**tables.get("train", {}), "shard": True}}
    with pytest.raises(UserError, match=sentence):
        small_recipe("moco_v3", "test_vit", **tables)


def test_another_method_is_refused() -> None:
    with pytest.raises(UserError, match="'moco_v2'; take moco_v3, simclr, byol"):
        small_recipe("moco_v2", "test_vit", train={"shard": True})
