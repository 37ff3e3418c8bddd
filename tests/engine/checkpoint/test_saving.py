"""Saves that are interrupted, have no room, or meet another run: at every instant there is a whole checkpoint."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import small_recipe
from launching import HERE, finish, pretrain, start, tensors, wait_for_lines, write_recipe

import sslkit
from sslkit.engine.checkpoint.format import newest_checkpoint, read_checkpoint
from sslkit.errors import UserError

LONG = {"max_steps": 0, "epochs": 40}


@pytest.mark.full
def test_killed_at_every_touch_of_the_disk(tmp_path: Path) -> None:
    """With keep = 1, so that the old checkpoint must go at the right moment and not before."""
    env = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "dying_saver.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-2]) > 30


def test_a_checkpoint_is_the_state_of_its_step_though_training_goes_on(tmp_path: Path) -> None:
    saves = {"checkpoint": {"every_steps": 1, "keep": 9}}
    sslkit.train(small_recipe("moco_v2", "test_resnet", **saves), tmp_path / "run")
    for step in (1, 4):
        stopped = small_recipe("moco_v2", "test_resnet", train={"max_steps": step})
        sslkit.train(stopped, tmp_path / str(step))
        one, other = tensors(tmp_path / "run", step), tensors(tmp_path / str(step), step)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def limit_file_size(process: subprocess.Popen[str], most: int) -> None:
    """From outside: no file may grow beyond so many bytes, as where a disk or a quota is full."""
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, hard))


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def saved(run: Path) -> list[str]:
    return sorted(each.name for each in (run / "checkpoints").glob("step-*"))


@pytest.mark.full
def test_no_room_left_and_then_room_again(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"max_steps": 100, "epochs": 2}, checkpoint={"every_steps": 5, "keep": 1})
    run = tmp_path / "run"
    process = start(pretrain(recipe, run))
    wait_for(lambda: saved(run), process)
    limit_file_size(process, 100_000)
    lines = (run / "metrics.jsonl").read_text().count("\n")
    wait_for_lines(run / "metrics.jsonl", lines + 30, process)
    during = saved(run)
    limit_file_size(process, resource.RLIM_INFINITY)
    said = finish(process)
    assert process.returncode == 0, said
    assert said.count("could not be saved: File too large") >= 3
    assert f"{during[0]} is the newest checkpoint" in said
    assert len(during) == 1
    assert read_checkpoint(run / "checkpoints/step-00000100").step == 100
    assert not list(run.rglob("*.tmp"))


@pytest.mark.full
def test_no_room_at_the_end_is_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"max_steps": 40}, checkpoint={"every_steps": 3, "keep": 1})
    process = start(pretrain(recipe, tmp_path / "run"))
    wait_for(lambda: saved(tmp_path / "run"), process)
    limit_file_size(process, 100_000)
    said = finish(process)
    assert process.returncode == 1, said
    assert "step 40 could not be saved: File too large" in said
    assert "Traceback" not in said
    checkpoint, complaints = newest_checkpoint(tmp_path / "run/checkpoints")
    assert checkpoint is not None
    assert not complaints
    again = start(pretrain(recipe, tmp_path / "run"))
    said = finish(again)
    assert again.returncode == 0, said
    assert f"from step {checkpoint.step} of 40" in said


@pytest.mark.full
def test_a_folder_has_one_run_and_a_dead_one_does_not_block(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train=LONG)
    process = start(pretrain(recipe, tmp_path / "run"))
    wait_for_lines(tmp_path / "run/metrics.jsonl", 2, process)
    with pytest.raises(UserError, match=f"process {process.pid} on .* is training there; wait for it, stop it"):
        sslkit.train(sslkit.load_recipe(recipe), tmp_path / "run")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert sslkit.train(sslkit.load_recipe(recipe, ["train.max_steps=3"]), tmp_path / "run").step == 3
    assert not (tmp_path / "run/.lock").exists()


@pytest.mark.full
def test_which_checkpoints_stay(tmp_path: Path) -> None:
    """Four steps an epoch: every second epoch's, the best by kNN, and the newest."""
    recipe = small_recipe(
        "moco_v2",
        "test_resnet",
        train={"epochs": 5, "max_steps": 0, "batch_size": 500},
        monitor={"every_epochs": 1, "data": "builtin:fashion_mnist", "max_train": 300, "diagnose_every": 0},
        checkpoint={"every_steps": 3, "keep": 1, "keep_every_epochs": 2, "keep_best": "knn"},
    )
    run = sslkit.train(recipe, tmp_path / "run")
    accuracy = {row["step"]: row["accuracy"] for row in run.results()}
    assert sorted(accuracy) == [4, 8, 12, 16, 20]
    best = max(accuracy, key=lambda step: (accuracy[step], -step))
    assert saved(tmp_path / "run") == [f"step-{step:08d}" for step in sorted({best, 8, 16, 20})]


@pytest.mark.full
@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ("[]", "without a readable manifest"),
        ("{}", "without a readable manifest"),
        ('{"files": 3}', "without a readable manifest"),
        ('{"files": {}}', "does not name model.safetensors"),
        ('{"files": {"../../recipe.toml": {"bytes": 1, "sha256": ""}}}', "which is not a file of this folder"),
        ("\xff\xfe", "without a readable manifest"),
        ("[" * 100_000, "without a readable manifest"),
    ],
)
def test_manifests_that_are_none(manifest: str, words: str, tmp_path: Path) -> None:
    sslkit.train(small_recipe(train={"max_steps": 1}), tmp_path / "run")
    folder = tmp_path / "run/checkpoints/step-00000001"
    (folder / "manifest.json").write_bytes(manifest.encode("latin-1"))
    with pytest.raises(UserError, match=words) as caught:
        sslkit.train(small_recipe(train={"max_steps": 2}), tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_of_a_stranger_is_plain_data(tmp_path: Path) -> None:
    """Sums that fit, and content that does not: a state without its keys, weights that are no safetensors, a link."""
    sslkit.train(small_recipe(train={"max_steps": 1}), tmp_path / "run")
    folder = tmp_path / "run/checkpoints/step-00000001"
    secret = tmp_path / "secret"
    secret.write_bytes((folder / "model.safetensors").read_bytes())

    def replaced(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    def refused() -> str:
        with pytest.raises(UserError) as caught:
            read_checkpoint(folder)
        return str(caught.value)

    whole = {name: (folder / name).read_bytes() for name in ("state.json", "model.safetensors")}
    for state in (b"{}", b"[1]", b'{"step": "x", "optimizer": {}, "recipe": {}}', b"\xff"):
        replaced("state.json", state)
        assert "state.json" in refused()
    replaced("state.json", whole["state.json"])
    header = (2**62).to_bytes(8, "little") + b"{}"
    for weights in (b"", b"PK\x03\x04", header, whole["model.safetensors"][:200]):
        replaced("model.safetensors", weights)
        assert "model.safetensors" in refused()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(secret)
    assert "model.safetensors" in refused()
