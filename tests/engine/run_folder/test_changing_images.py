"""Images that vanish, appear or change while a run trains or between two starts of it."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from launching import finish, pretrain, start, tensors, wait_for_lines, write_recipe
from PIL import Image

import sslkit
from sslkit.errors import UserError
from sslkit.files.jsonl_reader import read_lines

SHARE = 0.3


def recipe_of(tmp_path: Path, images: Path, steps: int, **data: object) -> Path:
    data = {"path": str(images), "split": "train", "workers": 1, "max_bad_share": SHARE, **data}
    train = {"max_steps": steps, "epochs": 40, "batch_size": 8}
    return write_recipe(tmp_path, data=data, train=train, checkpoint={"every_steps": 2})


def doomed(images: Path) -> list[Path]:
    return sorted(images.rglob("*.png"))[5:35:5]


@pytest.mark.full
def test_files_that_vanish_count_as_unreadable_and_the_run_goes_on(class_folders: Path, tmp_path: Path) -> None:
    """Gone between two starts, and then a kill: the order of samples stays what it was."""
    images = shutil.copytree(class_folders, tmp_path / "images")
    first = recipe_of(tmp_path, images, 6)
    stopped = start(pretrain(first, tmp_path / "run"))
    said = finish(stopped)
    assert stopped.returncode == 0, said
    gone = doomed(images)
    for file in gone:
        file.unlink()
    (images / "extra").mkdir()
    Image.new("RGB", (40, 40)).save(images / "extra/new.png")
    recipe = recipe_of(tmp_path, images, 30)
    process = start(pretrain(recipe, tmp_path / "run"))
    wait_for_lines(tmp_path / "run/metrics.jsonl", 12, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    again = start(pretrain(recipe, tmp_path / "run"))
    said = finish(again)
    assert again.returncode == 0, said
    assert "6 images of this run are missing and count as unreadable, such as " in said
    assert "1 image was added after this run started and is ignored" in said
    assert [row["step"] for row in read_lines(tmp_path / "run/metrics.jsonl")] == list(range(1, 31))
    bad = {Path(row["name"]).name for row in read_lines(tmp_path / "run/bad_samples.jsonl")}
    assert bad == {file.name for file in gone}


@pytest.mark.full
def test_kills_with_bad_images_change_no_bit(class_folders: Path, tmp_path: Path) -> None:
    images = shutil.copytree(class_folders, tmp_path / "images")
    for file in doomed(images)[:4]:
        file.write_bytes(file.read_bytes()[:80])
    recipe = recipe_of(tmp_path, images, 24)
    for run in ("whole", "killed"):
        process = start(pretrain(recipe, tmp_path / run))
        if run == "killed":
            wait_for_lines(tmp_path / run / "metrics.jsonl", 9, process)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            process = start(pretrain(recipe, tmp_path / run))
        said = finish(process)
        assert process.returncode == 0, said
    one, other = tensors(tmp_path / "whole", 24), tensors(tmp_path / "killed", 24)
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = [read_lines(tmp_path / run / "bad_samples.jsonl") for run in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 4


def test_too_many_gone_others_changed_and_a_forged_list(class_folders: Path, tmp_path: Path) -> None:
    images = shutil.copytree(class_folders, tmp_path / "images")
    run = tmp_path / "run"
    sslkit.train(sslkit.load_recipe(recipe_of(tmp_path, images, 2, workers=0)), run)
    more = sslkit.load_recipe(recipe_of(tmp_path, images, 4, workers=0))
    for file in sorted(images.rglob("*.png"))[:15]:
        file.rename(file.with_suffix(".gone"))
    with pytest.raises(UserError, match=r"15 of 40 images are missing, such as .*; restore the images"):
        sslkit.train(more, run)
    for file in images.rglob("*.gone"):
        file.rename(file.with_suffix(".png"))
    kept = {file: file.read_bytes() for file in images.rglob("*.png")}
    for file in kept:
        Image.new("RGB", (28, 28), "red").save(file)
    with pytest.raises(UserError, match="has other content"):
        sslkit.train(more, run)
    for file, content in kept.items():
        file.write_bytes(content)
    next(images.rglob("*.png")).unlink()
    listing = (run / "images.parquet").read_bytes()
    (run / "images.parquet").write_bytes(b"PAR1" + os.urandom(200) + b"PAR1")
    with pytest.raises(UserError, match="it had 40 images, there are 39 now"):
        sslkit.train(more, run)
    (run / "images.parquet").write_bytes(listing)
    assert sslkit.train(more, run).step == 4
