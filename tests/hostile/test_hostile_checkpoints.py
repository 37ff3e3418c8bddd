"""Malicious PyTorch checkpoints are refused before they are unpickled, using little time and memory."""

import json
import subprocess
import sys
import tempfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import hostile_checkpoints, instructed, patched, saved
from conftest import cli_error
from torch import nn

from sslkit.errors import UserError
from sslkit.publish.importing.convert import read_tensors
from sslkit.publish.importing.pickle_opcodes import check_opcodes

CASES = hostile_checkpoints()
MEGABYTES = 400  # four million marks take most of them; each attack wants thousands
SECONDS = 20.0  # the attacks take for ever

# Reads each file in turn; prints what was said, how much the process grew at most, and the time.
READER = """
import json, sys, time, warnings
from pathlib import Path
from sslkit.errors import UserError
from sslkit.publish.importing.convert import read_tensors

def peak():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmPeak")]
    return int(line.split()[1]) // 1024

for file in sys.argv[1:]:
    before, start = peak(), time.monotonic()
    try:
        said = f"read: {[*read_tensors(Path(file))]}"
    except UserError as error:
        said = str(error)
    print(json.dumps([said, peak() - before, time.monotonic() - start]))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, list[Any]]:
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, (content, _) in enumerate(CASES.values()):
            files.append(Path(folder) / f"{number}.pth.tar")
            files[-1].write_bytes(content)
        reader = subprocess.run([sys.executable, "-c", READER, *map(str, files)], capture_output=True, timeout=250)
    assert reader.returncode == 0, reader.stderr.decode()
    lines = [json.loads(line) for line in reader.stdout.splitlines()]
    return dict(zip(CASES, lines, strict=True))


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_that_asks_for_more_is_refused(case: str, answers: dict[str, list[Any]]) -> None:
    said, megabytes, seconds = answers[case]
    assert any(words in said for words in CASES[case][1].split("|")), said
    assert said.count(".pth.tar") == 1
    assert "\n" not in said
    assert len(said) < 500
    assert megabytes < MEGABYTES
    assert seconds < SECONDS


def test_at_the_door(tmp_path: Path) -> None:
    (tmp_path / "x.pth.tar").write_bytes(CASES["zeros, old"][0])
    assert "bytearray" in cli_error(["import", str(tmp_path / "x.pth.tar"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def trained() -> dict[str, Any]:
    """Everything that a training script stores in its checkpoint."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.rand(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5])
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3}
    weights = torch.rand(3, 4)
    return {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "scaler": scaler,
        "parameter": nn.Parameter(weights),
        "view": weights.t()[1:],
        "same": weights,
        "empty": torch.zeros(0, 5),
        "number": torch.tensor(3, dtype=torch.int64),
        "half": [torch.ones(2, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.bool, torch.uint8)],
        "eight bits": torch.ones(3).to(torch.float8_e4m3fn),
        "plain": (None, True, False, -7, 2**70, 1.5, "word", 10**6, [1, [2]], {"a": {1: 2, (1, "b"): 3}}),
        "kinds": (torch.float32, torch.Size([1, 2]), torch.device("cuda:0"), Counter({"a": 1}), OrderedDict(a=1)),
    }


@pytest.mark.parametrize("old", [False, True])
def test_what_a_training_program_saves_is_let_through(old: bool, tmp_path: Path) -> None:
    file = tmp_path / "x.pth.tar"
    content = trained()
    if old:
        del content["eight bits"]  # PyTorch's own reader cannot
    file.write_bytes(saved(content, old=old))
    check_opcodes(file)
    found = read_tensors(file)
    assert [*found] == [*trained()["state_dict"]]


def test_what_python_2_saved_is_let_through(tmp_path: Path) -> None:
    """In this version an OrderedDict was pickled as a list of pairs."""
    check_opcodes(written(tmp_path, instructed(b"ccollections\nOrderedDict\n]](X\1\0\0\0aK\1ea\x85R.")))
    with pytest.raises(UserError, match=r"OrderedDict without pairs"):
        check_opcodes(written(tmp_path, instructed(b"ccollections\nOrderedDict\n]](K\1ea\x85R.")))


@pytest.mark.parametrize("old", [False, True])
def test_one_byte_more_than_there_is(old: bool, tmp_path: Path) -> None:
    """The bound is exact: a tensor may use the last number of a storage, and none after it."""
    content = saved({"a": torch.zeros(1000)}, old=old)
    check_opcodes(written(tmp_path, content))
    shorter = patched(content, b"M\xe8\x03", b"M\xe7\x03", 1)  # the storage's length, which stands first
    with pytest.raises(UserError, match="larger than the file"):
        check_opcodes(written(tmp_path, shorter))


def written(folder: Path, content: bytes) -> Path:
    (folder / "x.pth").write_bytes(content)
    return folder / "x.pth"
