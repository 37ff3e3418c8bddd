"""CPU time of training with diagnostics relative to training without.

    python benchmarks/diagnostics_cost.py [--recipe quickstart] [--steps 100] [--pairs 3] [--set table.key=value]

The two alternate. CPU time of this process is used because other jobs on the machine affect wall time (data workers are
off). It also prints the share of the time spent inside the diagnostics, which is less noisy. The time before the first
step is not counted.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import sslkit
from sslkit.engine import trainer
from sslkit.engine.monitor.evaluations import RunMonitor


def measure(recipe: str, overrides: list[str], steps: int, every: int) -> tuple[float, float]:
    """CPU seconds of the steps, and of the diagnostics in them."""
    spent = {"steps": 0.0, "inside": 0.0}

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.process_time() - started

        return call

    keys = ["data.workers=0", "monitor.every_epochs=0", f"monitor.diagnose_every={every}", f"train.max_steps={steps}"]
    loaded = sslkit.load_recipe(recipe, [*overrides, *keys])
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(RunMonitor, "after_step", timed("inside", RunMonitor.after_step)),
        patch.object(trainer, "run_loop", timed("steps", trainer.run_loop)),
    ):
        sslkit.train(loaded, Path(folder) / "run")
    return spent["steps"], spent["inside"]


def main() -> None:
    """Measure alternately and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    ratios, shares = [], []
    for _ in range(arguments.pairs):
        without, _ = measure(arguments.recipe, arguments.overrides, arguments.steps, 0)
        with_them, inside = measure(arguments.recipe, arguments.overrides, arguments.steps, arguments.every)
        ratios.append(with_them / without)
        shares.append(inside / (with_them - inside))
    print(f"{arguments.recipe}, {arguments.steps} steps, diagnostics every {arguments.every}, {arguments.pairs} pairs:")
    print(f"  with / without: {median(ratios):.4f} ({', '.join(f'{ratio:.4f}' for ratio in ratios)})")
    print(f"  inside, of the rest: {median(shares):.2%} ({', '.join(f'{share:.2%}' for share in shares)})")


if __name__ == "__main__":
    main()
