"""Two gloo processes against one, on the same global batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_recipe
from safetensors.torch import load_file

import sslkit
from sslkit.files.jsonl_reader import read_lines

HERE = Path(__file__).parent
CHECKS = (
    *(
        "gathering",
        "exchanging",
        "summing",
        "averaging",
        "batch_norm",
        "running_statistics",
        "in_batch_loss",
        "encoder_in_parts",
    ),
    *("v1_resnet", "v2_resnet", "v2_vit", "v2_symmetric", "v3_resnet", "v3_vit"),
    *("simclr_resnet", "simclr_vit", "byol_resnet", "swav_resnet", "instdisc_vit", "softmax_vit"),
    *("v2_of_four_groups", "swav_of_four_groups"),
    *("memory_bank_vit", "end_to_end_resnet", "end_to_end_vit"),
    *("v2_in_slices", "v3_in_slices", "simclr_in_slices", "end_to_end_in_slices"),
)
# With the BatchNorm layers of GPUs.
ON_GPUS = ("v2_resnet", "v3_resnet", "simclr_resnet", "swav_of_four_groups", "v2_in_slices")
# Views, groups, momentum.
NORMS = ("1 1 0.1", "1 1 None", "2 1 0.1", "3 1 None", "1 2 0.35", "2 4 0.1", "1 2 None")
MISTAKES = (
    *("gather without gradient", "keys gathered without gradient", "labels without the rank's offset"),
    *("own keys queued only", "codes of the local batch", "shuffle inside the process", "noise drawn per process"),
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(command: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{env.get('PYTHONPATH', '')}", **extra}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=400, check=False)


@pytest.fixture(scope="module")
def differences() -> dict[str, float]:
    result = run([*TORCHRUN, str(HERE / "parts_on_two_ranks.py")])
    assert result.returncode == 0, result.stderr[-3000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.full
@pytest.mark.parametrize("check", CHECKS)
def test_part_equals_the_whole_batch(differences: dict[str, float], check: str) -> None:
    assert differences[check] < 1e-11


@pytest.mark.full
@pytest.mark.parametrize("check", [*(f"{name} on GPUs" for name in ON_GPUS), *(f"norms of {norm}" for norm in NORMS)])
def test_batch_norm_of_gpus_equals_one_process(differences: dict[str, float], check: str) -> None:
    """The GPU's code path, on CPU tensors; without it a layer would be slow, or wrong, on GPUs alone."""
    assert differences[check] < 1e-11


@pytest.mark.full
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_classic_mistake_of_distributed_code_is_seen(differences: dict[str, float], mistake: str) -> None:
    assert differences[f"mistake: {mistake}"] > 1e-4


@pytest.mark.full
def test_a_group_of_batch_norm_spans_processes() -> None:
    """SwAV's official runs synchronise within 8 of 64 GPUs: here within 2 of 4 processes, as one with 2 groups."""
    command = [word if word != "2" else "4" for word in TORCHRUN]
    result = run([*command, str(HERE / "groups_on_four_ranks.py")])
    assert result.returncode == 0, result.stderr[-3000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT "))
    assert max(json.loads(line.removeprefix("RESULT ")).values()) < 1e-11


# With BatchNorm float32 rounding grows from step to step; there the float64 checks above speak (1e-12).
@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "model", "tolerance"),
    [
        ("moco_v2", "test_vit", 1e-5),
        ("moco_v3", "test_vit", 1e-5),
    ],
)
def test_training_on_two_processes_equals_one(name: str, model: str, tolerance: float, tmp_path: Path) -> None:
    """Same samples, views, groups and shuffles: same losses and weights, and a resume across counts."""
    recipe = small_recipe(
        name,
        model,
        train={"max_steps": 6, "batch_size": 16},
        optim={"name": "sgd", "lr": 0.05, "weight_decay": 1e-4},
        checkpoint={"every_steps": 3},
        monitor={"every_epochs": 1, "data": "builtin:fashion_mnist", "max_train": 101, "diagnose_every": 2},
    )
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text(recipe.to_toml())
    alone = sslkit.train(recipe, tmp_path / "one")
    command = [*TORCHRUN, "-m", "sslkit.pretrain", str(recipe_file), "--output", str(tmp_path / "two")]
    result = run(command)
    assert result.returncode == 0, result.stderr[-3000:]
    together = sslkit.Run(tmp_path / "two", 6)
    assert [row["loss"] for row in together.metrics()] == pytest.approx(
        [row["loss"] for row in alone.metrics()], rel=tolerance
    )
    one, two = (load_file(tmp_path / n / "checkpoints/step-00000006/model.safetensors") for n in ("one", "two"))
    trained = [key for key in one if "running" not in key and "tracked" not in key]
    for key in trained:
        torch.testing.assert_close(two[key], one[key], rtol=tolerance, atol=tolerance, msg=key)
    assert together.results()[-1]["accuracy"] == pytest.approx(alone.results()[-1]["accuracy"], abs=0.003)
    for mine, theirs in zip(alone.results()[-1]["scores"], together.results()[-1]["scores"], strict=True):
        assert theirs["encoder"] == mine["encoder"]
        assert theirs["accuracy"] == pytest.approx(mine["accuracy"], abs=0.003)
    ones, twos = (read_lines(tmp_path / n / "diagnostics.jsonl") for n in ("one", "two"))
    assert [row["step"] for row in twos] == [1, 2, 4, 6]
    for mine, theirs in zip(ones, twos, strict=True):
        assert mine.keys() == theirs.keys()
        # The batch is the same, so its first images are; a similarity on an edge may fall to either side of it.
        for key in ("embedding_std", "effective_rank", "alignment", "uniformity"):
            assert theirs[key] == pytest.approx(mine[key], rel=1e-3), key
        assert sum(theirs["negative_histogram"]) == 16 * 15
    assert twos[-1]["lidar"] == pytest.approx(ones[-1]["lidar"], rel=1e-2)
    continued = sslkit.train(recipe, tmp_path / "mixed", resume=str(tmp_path / "two/checkpoints/step-00000003"))
    assert [row["loss"] for row in continued.metrics()] == pytest.approx(
        [row["loss"] for row in alone.metrics()][3:], rel=tolerance
    )


@pytest.mark.full
def test_accelerate_that_starts_too_few_is_refused(tmp_path: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process without a word; sslkit does not."""
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text(small_recipe().to_toml())
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    rest = ["-m", "sslkit.pretrain", str(recipe_file), "--output", str(tmp_path / "run")]
    silent = run([*launch, "--cpu", "--num_processes", "2", *rest])
    assert "2 processes were asked for and 1 started" in silent.stderr
    assert silent.returncode != 0
    assert not (tmp_path / "run").exists()
    working = run([*launch, "--multi_gpu", "--num_processes", "2", *rest], ACCELERATE_USE_CPU="true")
    assert working.returncode == 0, working.stderr[-3000:]
    assert "2 processes, cpu" in working.stdout
