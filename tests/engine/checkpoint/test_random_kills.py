"""Kill runs with SIGKILL at moments drawn at random; every one must end as the run that nobody touched."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import small_recipe
from launching import finish, pretrain, start

import sslkit
from sslkit.engine.checkpoint.format import newest_checkpoint
from sslkit.files.jsonl_reader import read_lines
from sslkit.methods import METHODS

KILLS = 5  # per method and number of processes
STEPS = 40
STEPS_PER_EPOCH = 20
TIMINGS = {"images_per_second", "data_wait", "seconds"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def recipe_file(folder: Path, name: str, workers: int) -> Path:
    """Two epochs with a save every third step, kNN and diagnostics, stochastic depth and, half the time, workers."""
    model = "test_vit" if name == "moco_v3" else "test_resnet"
    recipe = small_recipe(
        name,
        model,
        backbone={"name": model, "args": {"drop_path_rate": 0.2}},
        data={"path": "builtin:fashion_mnist", "split": "test", "workers": workers},
        train={"max_steps": 0, "epochs": 2, "batch_size": 2000 // STEPS_PER_EPOCH},
        optim={"name": "adamw", "lr": 1e-3, "weight_decay": 0.01},
        monitor={"every_epochs": 1, "data": "builtin:fashion_mnist", "max_train": 500, "diagnose_every": 8},
        checkpoint={"every_minutes": 0, "every_steps": 3, "keep": 1},
    )
    file = folder / f"workers{workers}.toml"
    file.write_text(recipe.to_toml())
    return file


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def kill_at_random(process: subprocess.Popen[str], run: Path, draws: random.Random) -> None:
    """SIGKILL launcher and processes some steps and some milliseconds from now; at start, in a step, save or kNN."""
    target = lines(run) + draws.randint(1, 9) if draws.random() < 0.8 else 0
    deadline = time.monotonic() + 120
    while lines(run) < min(target, STEPS) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(draws.uniform(0, 0.3) if target else draws.uniform(0, 8.0))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end_all(run)
    process.communicate()


def processes_left(run: Path) -> list[str]:
    """Command lines that still name the run: torchrun puts its processes into sessions of their own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if str(run) in words:
            found.append(entry.parent.name)
    return found


def end_all(run: Path) -> None:
    """A machine that is switched off takes all its processes with it."""
    deadline = time.monotonic() + 60
    while (left := processes_left(run)) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def untimed(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{key: row[key] for key in row.keys() - TIMINGS} for row in rows]


def written(run: Path) -> dict[str, object]:
    """Everything a run leaves that must not depend on how often it was killed."""
    checkpoint, complaints = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert not complaints
    folder = run / "checkpoints" / f"step-{checkpoint.step:08d}"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    steady = sslkit.Run(run, checkpoint.step)
    watched = read_lines(run / "diagnostics.jsonl")
    return {
        "step": checkpoint.step,
        "sums": {file: files[file]["sha256"] for file in ("model.safetensors", "optimizer.safetensors")},
        "encoder": (run / "encoder/model.safetensors").read_bytes(),
        "metrics": untimed(steady.metrics()),
        "diagnostics": untimed(watched),
        "knn": [(row["step"], row["accuracy"]) for row in steady.results()],
    }


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_kills_at_random_leave_no_trace(name: str, processes: int, tmp_path: Path) -> None:
    draws = random.Random(f"{name} {processes}")
    files = [recipe_file(tmp_path, name, workers) for workers in (0, 1)]
    whole = start(pretrain(files[0], tmp_path / "whole"), processes)
    said = finish(whole)
    assert whole.returncode == 0, said
    expected = written(tmp_path / "whole")
    assert expected["step"] == STEPS
    run = tmp_path / "killed"
    for _ in range(KILLS):
        process = start(pretrain(draws.choice(files), run), processes)
        kill_at_random(process, run, draws)
    last = start(pretrain(draws.choice(files), run), processes)
    said = finish(last)
    assert last.returncode == 0, said
    found = written(run)
    for part, value in expected.items():
        assert found[part] == value, f"{part} differs"
