"""The progress line of a run: time left and speed first, then what else fits in the width."""

import math
from collections.abc import Mapping

from sslkit.engine.logging.throughput import ThroughputMeter
from sslkit.engine.state import TrainingState
from sslkit.engine.step import StepResult
from sslkit.text import format_duration

WIDTH = 80  # columns


def progress_line(
    state: TrainingState, meter: ThroughputMeter, result: StepResult, metrics: Mapping[str, float]
) -> str:
    """Progress after a step, which this ends for ``meter``; ``metrics`` are the newest logged ones of the method."""
    rate = meter.end_step()
    seconds_left = meter.seconds_left(state.last_step - result.step - 1)
    epoch = f"epoch {(result.step + 1) / state.steps_per_epoch:.2f}/{state.recipe.train.epochs}"
    others = [f"{name} {value:.3g}" for name, value in metrics.items() if math.isfinite(value)]
    skipped = ["step skipped"] if result.skipped else []
    parts = [f"{rate:.3g} img/s" if rate < 100 else f"{rate:.0f} img/s", epoch, f"loss {result.loss:.4g}"]
    return fit([f"ETA {format_duration(seconds_left)}", *parts, *skipped, f"lr {result.lr:.3g}", *others])


def fit(parts: list[str], width: int = WIDTH) -> str:
    """The first parts, as many as fit in ``width`` columns, with two spaces between them."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > width:
            break
        line += f"  {part}"
    return line
