"""Time from the command to the end of the first step, and to print ``--help``.

    python benchmarks/starting.py [--rounds 7]

Runs a small recipe on the bundled images in separate processes, and compares with a process that only imports torch and
timm. The first step has ended when its line is in metrics.jsonl.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from side_by_side import in_turn, machine, ratios, table

PAUSE = 0.005  # seconds between checks for the line
BASE = "import torch and timm"
SMALL = (
    *("--method", "moco_v2", "--backbone", "test_vit", "--data", "builtin:fashion_mnist"),
    *("--set", "views.policy=small_gray", "--set", "train.batch_size=8", "--set", "train.log_every=1"),
    *("--set", "method.queue_size=1024", "--set", "method.bn_groups=1", "--set", "views.size=160"),
)


def imported(modules: str) -> None:
    """Run a process until its imports are done. Its exit, which is slow with PyTorch, is not counted."""
    words = [sys.executable, "-c", f"import {modules}; print('done', flush=True)"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        process.kill()


def show_help() -> None:
    """Run ``sslkit --help`` to its end."""
    subprocess.run([sys.executable, "-m", "sslkit", "--help"], check=True, stdout=subprocess.DEVNULL)


def first_step() -> None:
    """Run the command until the line of the first step is written."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "run/metrics.jsonl"
        words = [sys.executable, "-m", "sslkit.pretrain", *SMALL, "--output", f"{folder}/run"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as command:
            while not (metrics.exists() and metrics.read_bytes().endswith(b"\n")):
                if command.poll() is not None:
                    raise SystemExit(command.communicate()[0].decode())
                time.sleep(PAUSE)
            command.kill()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    words = parser.parse_args()
    works = {
        BASE: partial(imported, "torch, timm"),
        "import all that pretraining needs": partial(imported, "sslkit.engine.trainer"),
        "command to first step": first_step,
        "sslkit --help": show_help,
    }
    seconds = in_turn(works, words.rounds)
    print(machine("torch", "timm", "accelerate", "datasets", "albumentations"))
    rows = []
    for name, (middle, low, high) in ratios(seconds, BASE).items():
        own = statistics.median(seconds[name])
        rows.append([name, f"{own:.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"])
    print(table(["what", "seconds (median)", "relative to the imports"], rows))


if __name__ == "__main__":
    main()
