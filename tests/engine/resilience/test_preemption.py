"""A run that is asked to stop saves once, says so with exit code 75, and goes on as if nothing had been."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import small_recipe
from launching import finish, pretrain, saboteur, start, tensors, wait_for_lines, write_recipe

import sslkit
from sslkit.files.jsonl_reader import read_lines

LONG = {"max_steps": 0, "epochs": 40}


def assert_continues_to_the_same_bits(recipe: Path, whole: Path, stopped: Path, steps: int) -> None:
    one, other = tensors(whole, steps), tensors(stopped, steps)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [read_lines(run / "metrics.jsonl") for run in (whole, stopped)]
    assert [(row["step"], row["loss"]) for row in rows[0]] == [(row["step"], row["loss"]) for row in rows[1]]


@pytest.mark.full
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_to_the_whole_group_saves_and_exits_with_75(name: str, tmp_path: Path) -> None:
    """Data workers get it too, as from a terminal or a scheduler."""
    recipe = write_recipe(tmp_path, train={"max_steps": 40}, data={"workers": 1})
    process = start(pretrain(recipe, tmp_path / "run"))
    wait_for_lines(tmp_path / "run/metrics.jsonl", 5, process)
    os.killpg(process.pid, signal.Signals[name])
    said = finish(process)
    assert process.returncode == 75, said
    assert f"by {name}" in said
    assert "Traceback" not in said
    marker = (tmp_path / "run/PREEMPTED").read_text()
    step = int(marker.split()[1].rstrip(":"))
    assert name in marker
    assert [each.name for each in (tmp_path / "run/checkpoints").glob("step-*")] == [f"step-{step:08d}"]
    assert len(read_lines(tmp_path / "run/metrics.jsonl")) == step
    if name == "SIGTERM":
        for run in ("run", "whole"):
            process = start(pretrain(recipe, tmp_path / run))
            said = finish(process)
            assert process.returncode == 0, said
        assert not (tmp_path / "run/PREEMPTED").exists()
        assert_continues_to_the_same_bits(recipe, tmp_path / "whole", tmp_path / "run", 40)


@pytest.mark.full
def test_the_second_signal_stops_at_once(tmp_path: Path) -> None:
    """The first is heard; before the step ends, which hangs, comes the second."""
    recipe = write_recipe(tmp_path, train=LONG)
    process = start(saboteur("sleep", 4, 0, recipe, tmp_path / "run"))
    wait_for_lines(tmp_path / "run/metrics.jsonl", 3, process)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    finish(process, timeout=20)
    assert process.returncode == -signal.SIGTERM
    assert not (tmp_path / "run/PREEMPTED").exists()


@pytest.mark.full
def test_one_process_hears_it_and_both_stop_at_the_same_step(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train=LONG)
    process = start(pretrain(recipe, tmp_path / "run"), processes=2)
    wait_for_lines(tmp_path / "run/metrics.jsonl", 3, process)
    os.kill(second_of(process), signal.SIGUSR1)
    said = finish(process)
    marker = (tmp_path / "run/PREEMPTED").read_text()
    assert "a signal to another process" in marker, said
    step = int(marker.split()[1].rstrip(":"))
    assert (tmp_path / f"run/checkpoints/step-{step:08d}/manifest.json").is_file()
    assert said.count("exitcode  : 75") + said.count("(exitcode: 75)") >= 1, said


@pytest.mark.full
@pytest.mark.parametrize("seconds", [1.0, 3.0, 5.0])
def test_a_signal_while_it_starts_exits_with_75_too(seconds: float, tmp_path: Path) -> None:
    """Nothing is lost, and a script that queues it again need not know that nothing had begun."""
    recipe = write_recipe(tmp_path, train=LONG)
    process = start(pretrain(recipe, tmp_path / "run"))
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    assert process.returncode == 75, said
    assert "Traceback" not in said


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_processes_whose_launcher_dies_save_and_end(number: signal.Signals, tmp_path: Path) -> None:
    """torchrun dies of SIGUSR1, Slurm's warning, unless it is told to handle it; its processes live on."""
    recipe = write_recipe(tmp_path, train=LONG)
    process = start(pretrain(recipe, tmp_path / "run"), processes=2)
    wait_for_lines(tmp_path / "run/metrics.jsonl", 3, process)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(number)
    said = finish(process)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/fd").is_dir() and alive(pid) for pid in children):
        assert time.monotonic() < deadline, "they go on without a launcher"
        time.sleep(0.1)
    marker = (tmp_path / "run/PREEMPTED").read_text()
    step = int(marker.split()[1].rstrip(":"))
    assert (tmp_path / f"run/checkpoints/step-{step:08d}/manifest.json").is_file(), said
    lines = len(read_lines(tmp_path / "run/metrics.jsonl"))
    assert lines == step


def second_of(launcher: subprocess.Popen[str]) -> int:
    """Process id of rank 1."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return next(int(pid) for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.full
def test_a_signal_while_it_saves_or_measures(tmp_path: Path) -> None:
    """Four signals, each to a run that saves after each step and measures kNN after each epoch."""
    tables = {"train": {"max_steps": 24, "batch_size": 250, "epochs": 10}, "checkpoint": {"every_steps": 1, "keep": 1}}
    monitor = {"every_epochs": 1, "data": "builtin:fashion_mnist", "max_train": 200}
    recipe = write_recipe(tmp_path, **tables, monitor=monitor)
    whole = start(pretrain(recipe, tmp_path / "whole"))
    said = finish(whole)
    assert whole.returncode == 0, said
    for number in range(4):
        process = start(pretrain(recipe, tmp_path / "run"))
        wait_for_lines(tmp_path / "run/metrics.jsonl", 5 * number + 3, process)
        time.sleep(0.03 * number)
        process.send_signal(signal.SIGTERM)
        said = finish(process)
        assert process.returncode == 75, said
    process = start(pretrain(recipe, tmp_path / "run"))
    said = finish(process)
    assert process.returncode == 0, said
    assert_continues_to_the_same_bits(recipe, tmp_path / "whole", tmp_path / "run", 24)
    measured = [read_lines(tmp_path / run / "results.jsonl") for run in ("whole", "run")]
    assert [(row["step"], row["accuracy"]) for row in measured[0]] == [
        (row["step"], row["accuracy"]) for row in measured[1]
    ]


@pytest.mark.slow
def test_a_restart_by_accelerate_continues(tmp_path: Path) -> None:
    """accelerate launch --max_restarts after one process died."""
    recipe = write_recipe(tmp_path, train={"max_steps": 12}, checkpoint={"every_steps": 4})
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--max_restarts", "1"]
    env = {"ACCELERATE_USE_CPU": "true"}
    process = start([*launch, *pretrain(recipe, tmp_path / "run")], env=env)
    wait_for_lines(tmp_path / "run/metrics.jsonl", 6, process)
    os.kill(second_of(process), signal.SIGKILL)
    said = finish(process)
    assert process.returncode == 0, said
    assert "continuing" in said
    assert len(read_lines(tmp_path / "run/metrics.jsonl")) == 12


@pytest.mark.full
def test_a_restart_by_the_launcher_continues(tmp_path: Path) -> None:
    """torchrun --max_restarts after one process died: the same command, and nothing is lost."""
    recipe = write_recipe(tmp_path, train={"max_steps": 12}, checkpoint={"every_steps": 4})
    whole = start(pretrain(recipe, tmp_path / "whole"), processes=2)
    said = finish(whole)
    assert whole.returncode == 0, said
    process = start(pretrain(recipe, tmp_path / "run"), processes=2, launcher=["--max_restarts", "1"])
    wait_for_lines(tmp_path / "run/metrics.jsonl", 6, process)
    os.kill(second_of(process), signal.SIGKILL)
    said = finish(process)
    assert process.returncode == 0, said
    assert "continuing" in said
    assert_continues_to_the_same_bits(recipe, tmp_path / "whole", tmp_path / "run", 12)


def test_the_budget_of_hours(tmp_path: Path) -> None:
    recipe = small_recipe(train={"max_steps": 0, "epochs": 40, "max_hours": 1e-4})
    run = sslkit.train(recipe, tmp_path / "run")
    assert "max_hours = 0.0001" in run.stopped
    assert 0 < run.step < 40 * 62
    assert f"step {run.step}:" in (tmp_path / "run/PREEMPTED").read_text()
    unlimited = small_recipe(train={"max_steps": run.step + 2, "epochs": 40})
    assert sslkit.train(unlimited, tmp_path / "run").stopped == ""


@pytest.mark.full
def test_a_knn_that_was_owed_is_measured_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal in the last step of an epoch leaves no time for kNN; the next start measures it, of the same weights."""
    tables = {
        "train": {"max_steps": 6, "batch_size": 500, "epochs": 2},
        "monitor": {"every_epochs": 1, "data": "builtin:fashion_mnist", "max_train": 100, "diagnose_every": 0},
    }
    recipe = small_recipe("moco_v3", "test_vit", **tables)
    whole = sslkit.train(recipe, tmp_path / "whole")
    votes = iter([False] * 3 + [True] + [False] * 9)
    monkeypatch.setattr(
        "sslkit.engine.resilience.preemption.StopRequest.reason",
        property(lambda _self: "SIGTERM" if next(votes) else ""),
    )
    stopped = sslkit.train(recipe, tmp_path / "run")
    assert stopped.step == 4
    assert stopped.results() == []
    monkeypatch.undo()
    again = sslkit.train(recipe, tmp_path / "run")
    assert [(row["step"], row["accuracy"]) for row in again.results()] == [
        (row["step"], row["accuracy"]) for row in whole.results()
    ]
    assert [row["step"] for row in again.results()] == [4, 6]
