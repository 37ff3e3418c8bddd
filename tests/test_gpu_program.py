"""`benchmarks/gpu.py` runs on a CPU at toy size: every section, one that fails, and refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--output", str(folder / "gpu"), *words]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, check=False)


@pytest.mark.parametrize(
    "section",
    ["machine", "waits", "evaluation", *(pytest.param(each, marks=pytest.mark.full) for each in ("right", "speed"))]
    + [pytest.param(each, marks=pytest.mark.full) for each in ("data", "processes")],
)
def test_a_section_runs_at_toy_size(section: str, tmp_path: Path) -> None:
    done = run(tmp_path, "--toy", "--only", section)
    assert done.returncode == 0, done.stderr
    [found] = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert found["section"] == section
    assert not found["error"]
    assert found["rows"]
    assert not [row for row in found["rows"] if row.get("right") is False]
    assert f"### {section}" in (tmp_path / "gpu.md").read_text()


def test_a_section_without_time_is_an_error_of_its_own(tmp_path: Path) -> None:
    done = run(tmp_path, "--toy", "--only", "machine", "data", "--minutes", "0.3")
    assert done.returncode == 1
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [row["error"] for row in rows] == ["", "not run: no time left"]


@pytest.mark.parametrize(("words", "said"), [(["--only", "nothing"], "no section nothing"), ([], "there is no GPU")])
def test_what_cannot_run_is_said(words: list[str], said: str, tmp_path: Path) -> None:
    done = run(tmp_path, *words)
    assert done.returncode == 2
    assert said in done.stdout
