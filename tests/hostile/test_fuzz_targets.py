"""Every kept seed through its reader; and, where atheris is installed, each reader fuzzed for some seconds (slow)."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from targets import SEEDS, TARGETS

SECONDS = 15
PROGRAM = Path(__file__).with_name("fuzz_with_atheris.py")
SEED_FILES = sorted(file for file in SEEDS.rglob("*") if file.is_file())


def test_every_target_has_seeds_and_every_seed_a_target() -> None:
    assert {file.parent.name for file in SEED_FILES} == {*TARGETS}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("seed", SEED_FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_kept_seed(seed: Path) -> None:
    TARGETS[seed.parent.name](seed.read_bytes())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found_in_some_seconds(target: str, tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), target, f"-max_total_time={SECONDS}", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(re.findall(r"number_of_executed_units: (\d+)", done.stderr)[0]) > 100
    assert not [*tmp_path.iterdir()]
