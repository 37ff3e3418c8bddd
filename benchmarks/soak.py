"""Memory, files and threads of a long run with many saves, evaluations and restarts, observed from outside.

    python benchmarks/soak.py [--steps 4000] [--restarts 3] [--workers 1]

A small MoCo v2 saves every 25 steps and computes kNN and diagnostics often. Memory, open files, threads and processes
of the run and its data workers, disk and shared memory are sampled twice a second. The table compares the first third
of the last start with its last third.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import sslkit
from sslkit.recipe.resolve import build_recipe

WARM_STEPS = 400  # allocators, caches and lazily imported code fill up first
COLUMNS = {
    "memory": "MiB",
    "open files": "",
    "threads": "",
    "processes": "",
    "run folder": "MiB",
    "shared memory": "MiB",
}


def recipe_text(steps: int, workers: int) -> str:
    """The recipe to train, as TOML."""
    tables = {
        "method": {"name": "moco_v2", "dim": 16, "queue_size": 256, "bn_groups": 2},
        "backbone": {"name": "test_resnet"},
        "data": {"path": "builtin:fashion_mnist", "split": "test", "workers": workers},
        "views": {"policy": "small_gray", "size": 28},
        "train": {"epochs": -(-steps // 250), "max_steps": steps, "batch_size": 8, "log_every": 5},
        "monitor": {"every_epochs": 1, "data": "builtin:fashion_mnist", "max_train": 200, "diagnose_every": 20},
        "checkpoint": {"every_minutes": 0, "every_steps": 25, "keep": 2, "keep_best": "knn"},
        "schedule": {"warmup_epochs": 0},
    }
    return build_recipe(tables, name="soak").to_toml()


def family(pid: int) -> list[Path]:
    """The process and its descendants, as folders of /proc."""
    found, queue = [], [pid]
    while queue:
        folder = Path("/proc") / str(queue.pop())
        try:
            queue += [int(child) for child in (folder / "task" / folder.name / "children").read_text().split()]
        except OSError:
            continue
        found.append(folder)
    return found


def look(pid: int, run: Path) -> dict[str, float]:
    """Sample the resources of the run."""
    seen = dict.fromkeys(COLUMNS, 0.0)
    for folder in family(pid):
        try:
            # Proportional: pages that workers share with the main process count once.
            rollup = dict(line.split(":", 1) for line in (folder / "smaps_rollup").read_text().splitlines()[1:])
            seen["memory"] += int(rollup["Pss"].split()[0]) / 1024
            seen["open files"] += len(os.listdir(folder / "fd"))
            seen["threads"] += len(os.listdir(folder / "task"))
            seen["processes"] += 1
        except (OSError, KeyError):  # the process has just exited
            continue
    seen["run folder"] = size_of(run)
    seen["shared memory"] = size_of(Path("/dev/shm"))
    return seen


def size_of(folder: Path) -> float:
    """Size of the files below a folder in MiB."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total / 2**20


def soak(folder: Path, steps: int, restarts: int, workers: int) -> list[tuple[int, dict[str, float]]]:
    """Train, kill and continue. Returns (step, sizes) of the last start."""
    file, run = folder / "recipe.toml", folder / "run"
    file.write_text(recipe_text(steps, workers))
    kills = [WARM_STEPS // 2 * (number + 1) for number in range(restarts)]
    samples: list[tuple[int, dict[str, float]]] = []
    for kill_at in [*kills, steps + 1]:
        command = [sys.executable, "-m", "sslkit.pretrain", str(file), "--output", str(run)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
            samples = []
            while process.poll() is None:
                time.sleep(0.5)
                rows = sslkit.Run(run, 0).metrics()
                step = rows[-1]["step"] if rows else 0
                samples.append((step, look(process.pid, run)))
                if step >= kill_at:
                    os.killpg(process.pid, signal.SIGKILL)
                    break
            process.wait()
        print(f"start ended at step {samples[-1][0]} with {process.returncode}", flush=True)
    return [sample for sample in samples if sample[0] > kills[-1] + WARM_STEPS] if kills else samples


def compare(samples: list[tuple[int, dict[str, float]]]) -> dict[str, tuple[float, float]]:
    """Medians of the first and last third by column. The last two samples are dropped: the process may be exiting."""
    rows = [sizes for _, sizes in samples[:-2]]
    third = max(len(rows) // 3, 1)
    return {
        name: (median(row[name] for row in rows[:third]), median(row[name] for row in rows[-third:]))
        for name in COLUMNS
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = soak(Path(folder), options.steps, options.restarts, options.workers)
    print(f"{len(samples)} samples, steps {samples[0][0]} to {samples[-1][0]}")
    print(f"{'':16} {'first third':>12} {'last third':>12}")
    for name, (first, last) in compare(samples).items():
        print(f"{name:16} {first:12.1f} {last:12.1f} {COLUMNS[name]}")


if __name__ == "__main__":
    main()
