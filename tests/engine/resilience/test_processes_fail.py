"""Two processes, one of which dies, hangs, drifts or differs: the run ends soon, and says whose fault it was."""

import re
from pathlib import Path

import pytest
from launching import finish, pretrain, saboteur, start, write_recipe

from sslkit.files.jsonl_reader import read_lines

GUARD = {"timeout_seconds": 6.0, "compare_every": 2}


@pytest.mark.full
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("kill", r"process 1 is dead or frozen; its last heartbeat was at step [0-3], "),
        ("freeze", r"process 1 is dead or frozen; its last heartbeat was at step [0-3], "),
        ("sleep", r"process 1 is alive at step 3, in forward and backward"),
        ("raise", r"process 1 stopped by ValueError: out of luck"),
        ("memory", r"process 1 stopped by OutOfMemoryError: out of memory at step 3, .*; set train\.micro_batch=8 "),
        ("mismatch", r"process 1 "),
    ],
)
def test_the_other_process_names_it(what: str, words: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"max_steps": 0, "epochs": 40}, checkpoint={"every_steps": 2}, guard=GUARD)
    process = start(saboteur(what, 4, 1, recipe, tmp_path / "run"), processes=2)
    said = finish(process, timeout=120)
    assert process.returncode not in (0, None)
    assert re.search(words, said), said
    assert "process 0 cannot continue at step 3" in said
    assert (tmp_path / "run/checkpoints/step-00000002/manifest.json").is_file()


@pytest.mark.full
def test_weights_that_drift_apart_are_found_by_name(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"max_steps": 0, "epochs": 40}, guard=GUARD)
    process = start(saboteur("drift", 3, 1, recipe, tmp_path / "run"), processes=2)
    said = finish(process, timeout=120)
    assert process.returncode not in (0, None)
    assert "step 4: the processes have diverged: process 1 has a different projector." in said, said
    assert len(read_lines(tmp_path / "run/metrics.jsonl")) <= 4


@pytest.mark.full
def test_processes_with_different_recipes_do_not_start(tmp_path: Path) -> None:
    """Each rank reads the recipe of its own node; one was not updated."""
    for rank, seed in ((0, 1), (1, 2)):
        folder = tmp_path / f"node{rank}"
        folder.mkdir()
        write_recipe(folder, train={"max_steps": 6, "seed": seed})
    script = tmp_path / "by_rank.py"
    script.write_text(
        "import os, sys\nfrom sslkit.cli import main\n"
        f"main(['pretrain', f'{tmp_path}/node' + os.environ['RANK'] + '/recipe.toml', '--output', sys.argv[1]])\n"
    )
    process = start([str(script), str(tmp_path / "run")], processes=2)
    said = finish(process, timeout=120)
    assert process.returncode not in (0, None)
    assert "the processes do not agree: process 1 has a different recipe than process 0" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_a_healthy_pair_is_left_alone(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, "swav", "test_resnet", train={"max_steps": 5}, guard={"timeout_seconds": 60.0, "compare_every": 1}
    )
    process = start(pretrain(recipe, tmp_path / "run"), processes=2)
    said = finish(process)
    assert process.returncode == 0, said
