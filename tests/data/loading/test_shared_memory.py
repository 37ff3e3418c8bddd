"""Shared memory that is too small: fewer batches ahead, or one sentence, but no worker that dies without a word."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import small_recipe
from PIL import Image
from safetensors.torch import save_file

from sslkit.cli import main
from sslkit.data.loading import shared_memory
from sslkit.data.loading.shared_memory import HELD, PREFETCH, explain_death, free_bytes, prefetch_of
from sslkit.errors import RunError, UserError
from sslkit.evaluate.features.extraction import batch_bytes
from sslkit.evaluate.features.transforms import training_transform


def test_what_is_made_ahead_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    free: int | None = None
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: free)
    assert prefetch_of(100, 2) == PREFETCH
    for free in range(300, 5000, 100):
        if free // 100 < 2 + HELD:
            with pytest.raises(UserError, match="--shm-size"):
                prefetch_of(100, 2)
        else:
            ahead = prefetch_of(100, 2) or 0
            assert (2 * ahead + HELD) * 100 <= free
            assert ahead == PREFETCH or (2 * (ahead + 1) + HELD) * 100 > free


def test_without_shared_memory_nothing_is_free() -> None:
    assert free_bytes(Path("/no/such/folder")) is None


def test_processes_of_a_machine_share_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    alone = free_bytes(tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    shared = free_bytes(tmp_path)
    assert alone is not None
    assert shared is not None
    assert shared == pytest.approx(alone / 8, rel=0.05)  # others write to the disk meanwhile


@pytest.mark.full
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_run_with_hardly_any_says_so_at_once(tmp_path: Path) -> None:
    """A mount name space of its own whose /dev/shm holds 300 kB."""
    train, data = {"max_steps": 3, "batch_size": 200}, {"workers": 2}
    (tmp_path / "recipe.toml").write_text(small_recipe("moco_v2", "test_resnet", train=train, data=data).to_toml())
    run = f"{sys.executable} -m sslkit.pretrain {tmp_path}/recipe.toml --output {tmp_path}/run"
    mounted = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size=300k tmpfs /dev/shm && exec {run}"]
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(mounted, capture_output=True, text=True, timeout=120, env=env)
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no mounts here")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert (
        "[data] workers: 2 workers pass batches of 1.2 MiB through /dev/shm, which has 0.3 MiB free for" in done.stderr
    )
    assert not (tmp_path / "run/metrics.jsonl").exists()


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for number in range(40):
        (folder / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 6 * number, np.uint8)).save(folder / f"class{number % 2}/{number}.png")
    return folder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """An exported folder of a small model."""
    model = timm.create_model("test_resnet", num_classes=0)
    (tmp_path / "model").mkdir()
    save_file(model.state_dict(), tmp_path / "model" / "model.safetensors")
    preprocessing = {"input_size": [3, 160, 160], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": {**preprocessing, "crop_pct": 0.9}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return tmp_path / "model"


def test_an_evaluation_with_workers_looks_at_it_first(
    classes: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    knn = ["eval", "knn", str(encoder), "--data", str(classes), "--k", "5", "--workers", "2", "--no-cache"]
    finetune = ["eval", "finetune", str(encoder), "--data", str(classes), "--workers", "2", "--batch-size", "8"]
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: 300 * 1024)
    assert "--workers: 2 workers pass batches of 75.0 MiB through /dev/shm, which has 0.3 MiB" in refused(knn, capsys)
    assert "--workers: 2 workers pass batches of 2.3 MiB through /dev/shm" in refused(finetune, capsys)
    monkeypatch.setattr(shared_memory.os, "access", lambda *_: False)
    assert "--workers: workers need /dev/shm, which cannot be written to" in refused(knn, capsys)


def test_a_read_only_one_is_a_sentence_where_images_are_read_by_workers(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shared_memory.os, "access", lambda *_: False)
    for command in (["data", "check", str(classes)], ["prepare", str(classes), str(tmp_path / "packed")]):
        assert "--workers: workers need /dev/shm" in refused([*command, "--workers", "2"], capsys)
        with pytest.raises(SystemExit) as ended:
            main([*command, "--workers", "0"])
        assert not ended.value.code


@pytest.mark.full
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_run_with_a_read_only_one(classes: Path, tmp_path: Path) -> None:
    """With workers it is refused in a sentence and writes nothing; without, it trains."""
    data = {"path": str(classes), "split": "train", "workers": 2}
    train, method = {"max_steps": 1, "batch_size": 8}, {"queue_size": 16}
    recipe = small_recipe("moco_v2", "test_resnet", data=data, train=train, method=method)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    script = f"""
import pathlib
from sslkit.cli import main
from sslkit.data.loading.worker_status import StatusBoard
for words in ([], ["--set", "data.workers=0"]):
    try:
        main(["pretrain", "{tmp_path}/recipe.toml", "--output", "{tmp_path}/run", *words])
    except SystemExit as ended:
        print("ended", ended.code or 0, pathlib.Path("{tmp_path}/run").exists())
StatusBoard(0)
"""
    mounted = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"', "sh"]
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [*mounted, sys.executable, "-c", script], capture_output=True, text=True, timeout=240, env=env
    )
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no mounts here")
    assert [line for line in done.stdout.splitlines() if line.startswith("ended")] == ["ended 2 False", "ended 0 True"]
    assert "[data] workers: workers need /dev/shm, which cannot be written to" in done.stderr
    assert "Traceback" not in done.stderr


def test_workers_that_do_not_fit_are_done_without_by_a_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: 500)
    assert shared_memory.fitting_workers(100, 2) == 2
    assert shared_memory.fitting_workers(100, 4) == 0
    monkeypatch.setattr(shared_memory.os, "access", lambda *_: False)
    assert shared_memory.fitting_workers(1, 1) == 0


def test_a_worker_that_died_is_one_sentence() -> None:
    died = "DataLoader worker (pid 7) is killed by signal: Alarm clock. "
    with pytest.raises(RunError, match=r"a data worker died: .*Alarm clock.*fewer --workers"), explain_death(1):
        raise RuntimeError(died)
    with pytest.raises(RuntimeError, match="another"), explain_death(1):
        raise RuntimeError("another")


def test_how_much_a_batch_takes_changes_no_random_number() -> None:
    config = {"input_size": (3, 20, 24), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), torch.rand(1)
    random.seed(1)
    torch.manual_seed(1)
    assert batch_bytes(training_transform(config), 5) == 5 * 3 * 20 * 24 * 4
    assert (random.random(), torch.rand(1)) == expected
