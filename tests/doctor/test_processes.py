"""Queue, bank and weights on two processes, sound and with one process forgotten."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import small_recipe

from sslkit.doctor.process_checks import NOT_LAUNCHED

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    """What torchrun does, without its own start."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(HERE / "doctor_on_two_ranks.py")]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        printed = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], [err[-2000:] for _, err in printed]
    line = next(line for line in printed[0][0].splitlines() if line.startswith("RESULT "))
    answer: dict[str, list[str]] = json.loads(line.removeprefix("RESULT "))
    return answer


@pytest.mark.full
@pytest.mark.parametrize("name", ["moco_v2", "moco_v3", "memory_bank"])
def test_sound_methods_agree(found: dict[str, list[str]], name: str) -> None:
    assert found[name][0] == "ok"
    assert "equal on 2 processes" in found[name][1]


@pytest.mark.full
@pytest.mark.parametrize(
    ("mistake", "part"),
    [
        ("own keys queued only", "queue.keys"),
        ("own memories kept only", "bank.rows"),
        ("teacher moved on one", "teacher_backbone"),
    ],
)
def test_a_forgotten_process_is_named(found: dict[str, list[str]], mistake: str, part: str) -> None:
    verdict, sentence = found[mistake]
    assert verdict == "fault"
    assert f"a different {part}" in sentence


def test_one_process_says_that_it_was_not_checked() -> None:
    assert small_recipe().train.processes == 0
    assert NOT_LAUNCHED.verdict == "not applicable"
    assert "torchrun" in NOT_LAUNCHED.sentence
