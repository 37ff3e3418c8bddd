"""A run over images nobody looked at lists every bad one once, and when killed still ends with the same bits."""

import ctypes
import os
import signal
from pathlib import Path

import pytest
import torch
from hostile import bad_images, good_images, write_hostile_things
from launching import finish, pretrain, start, tensors, wait_for_lines, write_recipe

from sslkit.files.jsonl_reader import read_lines

PLAIN = 150  # images besides, so that the share of bad ones is one that a recipe can allow
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def heed_permissions() -> None:
    """Take from what is started next root's right to read what it may not."""
    if os.geteuid() == 0:
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def write_folder(root: Path) -> tuple[int, set[str]]:
    """The number of files that are listed as images, and the names of those that cannot be read."""
    root.mkdir()
    good = good_images()
    for name, content in good.items():
        (root / name).write_bytes(content)
    bad = bad_images()
    for name, (content, _) in bad.items():
        (root / name).write_bytes(content)
    (root / "private.png").write_bytes(good["plain.png"])
    (root / "private.png").chmod(0)
    odd = [b"caf\xe9.png", "日本語 🐈.png".encode(), b"line\nbreak.png", b"'; rm -rf $HOME #.png"]
    for name in odd:
        (Path(os.fsdecode(os.fsencode(root) + b"/" + name))).write_bytes(good["plain.png"])
    for number in range(PLAIN):
        (root / f"plain{number}.png").write_bytes(good["plain.png"])
    things = write_hostile_things(root)
    count = len(good) + len(bad) + 1 + len(odd) + PLAIN + len(things)
    return count, {*bad, "private.png", *things}


@pytest.mark.full
def test_a_run_over_hostile_images_lists_them_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    count, unreadable = write_folder(tmp_path / "images")
    batch, epochs = 20, 2
    steps = epochs * (count // batch)
    recipe = write_recipe(
        tmp_path,
        data={"path": str(tmp_path / "images"), "split": "train", "workers": 1, "max_bad_share": 0.25},
        train={"max_steps": 0, "epochs": epochs, "batch_size": batch},
        checkpoint={"every_steps": 3},
    )
    whole = start(pretrain(recipe, tmp_path / "whole"), before=heed_permissions)
    said = finish(whole)
    assert whole.returncode == 0, said
    assert f"{count} images" in said
    listed = [Path(row["name"]).name for row in read_lines(tmp_path / "whole/bad_samples.jsonl")]
    assert len(listed) == len(set(listed))
    assert set(listed) <= unreadable
    # An epoch leaves out the rest that makes no batch: in two, hardly an image is left out twice.
    assert len(listed) >= len(unreadable) - 2
    assert "private.png" in listed

    for lines in (4, 13):
        process = start(pretrain(recipe, tmp_path / "run"), before=heed_permissions)
        wait_for_lines(tmp_path / "run/metrics.jsonl", lines, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = start(pretrain(recipe, tmp_path / "run"), before=heed_permissions)
    said = finish(process)
    assert process.returncode == 0, said
    one, other = tensors(tmp_path / "whole", steps), tensors(tmp_path / "run", steps)
    assert all(torch.equal(one[name], other[name]) for name in one)
    again = [Path(row["name"]).name for row in read_lines(tmp_path / "run/bad_samples.jsonl")]
    assert sorted(again) == sorted(listed)
