"""Every program in benchmarks/ runs, at a size at which its figures mean nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SMALL = {
    "training_step.py": "--methods moco_v2 moco_v3 --size 32 --batch 8 --rounds 1 --backbone test_vit",
    "pieces.py": "--rounds 1 --batch 8 --models test_vit",
    "neighbours.py": "--bank 3000 --queries 200 --width 16 --rounds 1",
    "loading.py": "--rounds 1 --sizes 80x60",
    "starting.py": "--rounds 1",
    "indexing.py": "--files 3000 --tree {folder}/tree --workers 2",
}


@pytest.mark.parametrize("program", SMALL)
def test_a_benchmark_prints_its_table(program: str, tmp_path: Path) -> None:
    words = SMALL[program].format(folder=tmp_path).split()
    command = [sys.executable, str(ROOT / "benchmarks" / program), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) >= 3, done.stdout
    assert "nan" not in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
def test_the_model_of_bytes_agrees_with_the_wire(tmp_path: Path) -> None:
    """What gloo sends over loopback in a namespace of its own, packets' headers and all, against the written model."""
    program = str(ROOT / "benchmarks/processes.py")
    words = ["--counts", "2", "--backbone", "resnet18", "--side", "32", "--batch", "8", "--rounds", "0"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, program, *words], capture_output=True, text=True, cwd=tmp_path, env=env)
    if "unshare" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip("no network namespaces here")
    assert done.returncode == 0, done.stderr
    [row] = [line for line in done.stdout.splitlines() if line.startswith("| 2 |") and line.count("|") == 5]
    assert 1.0 <= float(row.split("|")[-2]) < 1.02
