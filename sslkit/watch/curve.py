"""A number over time in bounded memory, and as a line of a terminal."""

import itertools
import math
from typing import Any

MOST = 1024  # points that are kept; a terminal has fewer columns
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*#@"


class Curve:
    """Means of equally long stretches of what was added; two stretches become one when there are too many."""

    def __init__(self) -> None:
        self.means: list[float] = []
        self.stride, self.sum, self.count = 1, 0.0, 0
        self.newest: float | None = None
        self.lowest, self.highest = math.inf, -math.inf

    def add(self, value: Any) -> None:
        """Take up a value; what is no finite number is remembered as the newest only, as None."""
        self.newest = finite(value)
        if self.newest is None:
            return
        self.lowest, self.highest = min(self.lowest, self.newest), max(self.highest, self.newest)
        self.sum, self.count = self.sum + self.newest, self.count + 1
        if self.count == self.stride:
            self.means.append(self.sum / self.count)
            self.sum, self.count = 0.0, 0
        if len(self.means) == MOST:
            self.means = [(one + other) / 2 for one, other in zip(self.means[::2], self.means[1::2], strict=True)]
            self.stride *= 2

    def points(self, width: int) -> list[float]:
        """At most ``width`` means of stretches, as equal as can be, of all that was added."""
        values = self.means + ([self.sum / self.count] if self.count else [])
        columns = min(width, len(values))
        edges = [column * len(values) // columns for column in range(columns + 1)] if columns > 0 else []
        return [sum(values[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]


def sparkline(points: list[float], bars: str = BARS) -> str:
    """One of eight bars for each point, from the lowest to the highest; the middle one where all are equal."""
    if not points:
        return ""
    lowest, highest = min(points), max(points)
    if highest == lowest:
        return bars[len(bars) // 2 - 1] * len(points)
    scale = (len(bars) - 1) / (highest - lowest)
    return "".join(bars[round((point - lowest) * scale)] for point in points)


def finite(value: Any) -> float | None:
    """A number that sums of can be formed, or None."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    return None
