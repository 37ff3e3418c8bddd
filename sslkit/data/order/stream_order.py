"""The order of a stream, whose rows can only be read by whole groups: few of them at a time, and their images mixed.

An epoch lays the groups in a row, in an order of its own, and cuts that row into equal lanes. Every batch takes an
equal part of several lanes; a lane's images are mixed within windows of it. It is a permutation of all images, so that
none is lost and none comes twice, and a function of (seed, epoch), so that a run resumes exactly and on any number of
processes and workers. Each of these reads lanes of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sslkit.random_draws import DrawPurpose

GROUPS, WINDOW = 0, 1  # the third word


@dataclass(frozen=True)
class Layout:
    """How batches are laid over a stream.

    Attributes:
        across: Lanes of which every batch takes an equal part, the first of them for the first images of a batch.
        turns: Batches after which the same lanes come again; each batch of a turn has lanes of its own.
        window: Images of a lane that are mixed, or a few more: whole groups.
    """

    across: int
    turns: int
    window: int


@dataclass(frozen=True)
class Lanes:
    """Groups of rows, and how many images may be held to mix them.

    Attributes:
        sizes: Rows of each group.
        buffer: Images held at a time, by all processes and their workers together.
    """

    sizes: tuple[int, ...]
    buffer: int

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Position of the first row of each group, and the end of the last."""
        return np.cumsum([0, *self.sizes], dtype=np.int64)

    @property
    def mean_size(self) -> float:
        """Rows of a group."""
        return float(self.starts[-1]) / len(self.sizes)

    def layout(self, batch_size: int) -> Layout:
        """As many lanes as the buffer has room for groups, and at least two groups long, as powers of two."""
        room = min(self.buffer / self.mean_size, len(self.sizes) / 2)
        doublings = math.frexp(max(room, 1.0))[1] - 1
        across = math.gcd(2 ** -(-doublings // 2), batch_size)
        lanes = 2**doublings
        return Layout(across, lanes // across, max(self.buffer // lanes, math.ceil(self.mean_size)))

    def groups_held(self, batch_size: int, processes: int, workers: int) -> int:
        """Groups that one worker of one process reads from at the same time."""
        layout = self.layout(batch_size)
        across = 1 if layout.across % processes == 0 else 2  # a process's part may begin within a lane
        across = min(max(layout.across // processes, 1) + across - 1, layout.across)
        turns = layout.turns // math.gcd(layout.turns, max(workers, 1))
        return across * turns * (math.ceil(layout.window / self.mean_size) + 1) + 1

    def epoch(self, key: Sequence[int], batch_size: int) -> "EpochLanes":
        """The lanes of an epoch.

        Args:
            key: What the order depends on: seed, epoch, and how often the run went back to take another order.
            batch_size: Of all processes.
        """
        return EpochLanes(self, tuple(key), batch_size)


@dataclass(frozen=True)
class EpochLanes:
    """The images of an epoch's batches; see `Lanes.epoch`."""

    lanes: Lanes
    key: tuple[int, ...]
    batch_size: int

    @cached_property
    def _layout(self) -> Layout:
        return self.lanes.layout(self.batch_size)

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return self._rng(GROUPS).permutation(len(self.lanes.sizes))

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Where each group ends, once they lie in the epoch's order."""
        return np.cumsum(np.array(self.lanes.sizes, dtype=np.int64)[self._order])

    @cached_property
    def _bounds(self) -> NDArray[np.int64]:
        """Where each lane begins, and the last one ends: lanes of the same part of a batch lie together."""
        steps = int(self.lanes.starts[-1]) // self.batch_size
        visits = [len(range(turn, steps, self._layout.turns)) for turn in range(self._layout.turns)]
        lengths = np.tile(np.array(visits, dtype=np.int64), self._layout.across) * self._part
        return np.cumsum([0, *lengths])

    @cached_property
    def _edges(self) -> dict[int, NDArray[np.int64]]:
        return {}

    @property
    def _part(self) -> int:
        return self.batch_size // self._layout.across

    def rows(self, batch: int, first: int, last: int) -> NDArray[np.int64]:
        """Positions of images ``first`` to ``last``, without the last, of the epoch's batch ``batch``."""
        visit, turn = divmod(batch, self._layout.turns)
        taken, part = [], self._part
        for lane in range(first // part, -(-last // part)):
            here = slice(max(first - lane * part, 0), last - lane * part)
            taken.append(self._visit(lane * self._layout.turns + turn, visit * part)[here])
        return self._positions(np.concatenate(taken))

    def _visit(self, lane: int, start: int) -> NDArray[np.int64]:
        """A batch's part of a lane, from that place of it on, mixed within the lane's windows."""
        if lane not in self._edges:
            self._edges[lane] = self._windows(lane)
        edges = self._edges[lane]
        first, last = np.searchsorted(edges, [start, start + self._part - 1], side="right")
        mixed = [
            edges[window - 1] + self._rng(WINDOW, lane, window).permutation(edges[window] - edges[window - 1])
            for window in range(first, last + 1)
        ]
        skipped = start - edges[first - 1]
        return int(self._bounds[lane]) + np.concatenate(mixed)[skipped : skipped + self._part]

    def _windows(self, lane: int) -> NDArray[np.int64]:
        """Where in a lane each of its windows begins, and the last one ends. A window is of whole groups."""
        begin, end = self._bounds[lane : lane + 2]
        low, high = np.searchsorted(self._ends, [begin, end], side="right")
        starts = self._ends[low:high] - begin  # of all groups but the first
        # Lanes begin at different places of a window, so that their groups are not all due in the same batch.
        shift = lane * self._layout.window // (len(self._bounds) - 1)
        numbers = (np.concatenate([[0], starts]) + shift) // self._layout.window
        return np.concatenate([[0], starts[np.diff(numbers) > 0], [end - begin]])

    def _positions(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """From places in the epoch's order of groups to positions in the source."""
        place = np.searchsorted(self._ends, rows, side="right")
        group = self._order[place]
        return self.lanes.starts[group + 1] - (self._ends[place] - rows)

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.key[0], DrawPurpose.STREAM_ORDER, *purpose, *self.key[1:]])
