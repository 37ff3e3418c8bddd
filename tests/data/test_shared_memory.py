"""Shared memory that is too small: fewer batches ahead, or one sentence, but no worker that dies without a word."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import small_recipe

from sslkit.data.shared_memory import HELD, PREFETCH, fitting_prefetch, free_bytes
from sslkit.errors import UserError


def test_what_is_made_ahead_fits() -> None:
    for free in range(500, 5000, 100):
        if free // 100 < 2 + HELD:
            with pytest.raises(UserError, match="--shm-size"):
                fitting_prefetch(100, 2, free)
        else:
            ahead = fitting_prefetch(100, 2, free)
            assert (2 * ahead + HELD) * 100 <= free
            assert ahead == PREFETCH or (2 * (ahead + 1) + HELD) * 100 > free
    assert fitting_prefetch(100, 2, None) == PREFETCH
    assert free_bytes(Path("/no/such/folder")) is None


def test_processes_of_a_machine_share_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    alone = free_bytes(tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    shared = free_bytes(tmp_path)
    assert alone is not None
    assert shared is not None
    assert shared == pytest.approx(alone / 8, rel=0.05)  # others write to the disk meanwhile


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
