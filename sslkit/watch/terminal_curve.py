"""A curve in bounded memory, and its drawing as one line of characters."""

import itertools
import math
from typing import Any

from sslkit.files.jsonl_reader import number

MAX_POINTS = 1024  # more than a terminal has columns
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*#@"


class Curve:
    """Means over intervals of equal length; pairs of intervals are merged when there are too many.

    ``newest`` is the last value that was added; None if it is not a finite number.
    """

    def __init__(self) -> None:
        self.means: list[float] = []
        self.interval, self.sum, self.count = 1, 0.0, 0
        self.newest: float | None = None
        self.lowest, self.highest = math.inf, -math.inf

    def add(self, value: Any) -> None:
        """Add a value. If it is not a finite number, only `newest` changes, to None."""
        self.newest = number(value)
        if self.newest is None:
            return
        self.lowest, self.highest = min(self.lowest, self.newest), max(self.highest, self.newest)
        self.sum, self.count = self.sum + self.newest, self.count + 1
        if self.count == self.interval:
            self.means.append(self.sum / self.count)
            self.sum, self.count = 0.0, 0
        if len(self.means) == MAX_POINTS:
            self.means = [(one + other) / 2 for one, other in zip(self.means[::2], self.means[1::2], strict=True)]
            self.interval *= 2

    def points(self, width: int) -> list[float]:
        """At most ``width`` means over all values, over intervals as equal as possible."""
        values = self.means + ([self.sum / self.count] if self.count else [])
        columns = min(width, len(values))
        edges = [column * len(values) // columns for column in range(columns + 1)] if columns > 0 else []
        return [sum(values[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]


def sparkline(points: list[float], bars: str = BARS) -> str:
    """One bar per point, scaled from the lowest to the highest point; the middle bar if all points are equal."""
    if not points:
        return ""
    lowest, highest = min(points), max(points)
    if highest == lowest:
        return bars[len(bars) // 2 - 1] * len(points)
    scale = (len(bars) - 1) / (highest - lowest)
    return "".join(bars[round((point - lowest) * scale)] for point in points)
