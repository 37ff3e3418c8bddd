"""A disk with no room at all, a real one: training goes on, and what was owed is written once there is room."""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from launching import finish, pretrain, start, tensors, wait_for_lines, write_recipe

from sslkit.engine.checkpoint.format import newest_checkpoint
from sslkit.files.jsonl_reader import read_lines
from sslkit.files.jsonl_writer import JsonlWriter, append_text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Use up every byte."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as stream, suppress(OSError):
        while stream.write(bytes(4096)):
            pass
    return ballast


def read_until(words: str, process: subprocess.Popen[str], seconds: float = 100.0) -> str:
    """What a process prints up to these words; a file's last page takes some more lines on a full disk."""
    assert process.stdout is not None
    said, deadline = "", time.monotonic() + seconds
    while words not in said:
        assert time.monotonic() < deadline, said
        if select.select([process.stdout], [], [], 1.0)[0]:
            said += (read := os.read(process.stdout.fileno(), 65536).decode())
            assert read, said  # it has ended
    return said


@pytest.mark.full
def test_a_full_disk_stops_nothing_and_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    tables = {"train": {"max_steps": 120, "epochs": 2}, "checkpoint": {"every_steps": 10, "keep": 1}}
    monitor = {"diagnose_every": 5}
    recipe = write_recipe(tmp_path, **tables, monitor=monitor)
    whole = start(pretrain(recipe, tmp_path / "whole"))
    said = finish(whole)
    assert whole.returncode == 0, said
    run = small_disk / "run"
    process = start(pretrain(recipe, run))
    wait_for_lines(run / "metrics.jsonl", 12, process)
    while not list((run / "checkpoints").glob("step-*")):
        time.sleep(0.01)
    ballast = fill(small_disk)
    said_before = read_until("metrics.jsonl: No space left on device", process)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line)  # none is half there
    ballast.unlink()
    said = said_before + finish(process)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    for name in ("metrics.jsonl", "diagnostics.jsonl"):
        ours, theirs = (read_lines(folder / name) for folder in (run, tmp_path / "whole"))
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    one, other = tensors(run, 120), tensors(tmp_path / "whole", 120)
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.full
def test_a_disk_that_stays_full_ends_in_one_sentence_with_the_last_checkpoint(small_disk: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"max_steps": 0, "epochs": 40}, checkpoint={"every_steps": 4, "keep": 1})
    run = small_disk / "run"
    process = start(pretrain(recipe, run))
    wait_for_lines(run / "metrics.jsonl", 9, process)
    fill(small_disk)
    time.sleep(2.0)
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    assert process.returncode == 1, said
    assert "could not be saved: No space left on device" in said
    assert "Traceback" not in said
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step >= 4


def test_a_half_line_of_a_crash_does_not_swallow_the_next(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "accur')
    append_text(file, '{"step": 3}\n')
    assert [row["step"] for row in read_lines(file)] == [1, 3]


def test_lines_wait_for_a_folder_that_comes_back(tmp_path: Path) -> None:
    said: list[str] = []
    lines = JsonlWriter(tmp_path / "gone/metrics.jsonl", said.append)
    lines.append({"step": 1})
    lines.append({"step": 2})
    assert len(said) == 2
    assert "2 lines will be written later" in said[1]
    (tmp_path / "gone").mkdir()
    lines.append({"step": 3})
    assert [row["step"] for row in read_lines(tmp_path / "gone/metrics.jsonl")] == [1, 2, 3]
