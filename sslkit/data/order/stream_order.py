"""The order of a stream, whose rows can only be read in whole row groups: few groups at a time, their images mixed.

An epoch puts the row groups in random order and cuts this sequence into segments of equal length. Every batch takes an
equal part of several segments, and the images of a segment are shuffled within windows. The result is a permutation of
all images and depends on the seed and the epoch only. Each process and worker reads segments of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from sslkit.data.order.epoch_order import EpochOrder, Indices
from sslkit.random_draws import DrawPurpose

GROUPS, WINDOW = 0, 1  # third element of a draw's key


@dataclass(frozen=True)
class Interleave:
    """How batches are interleaved from segments."""

    width: int  # segments of which every batch takes an equal part; the first fills the first part of a batch
    cycle: int  # number of batches after which the same segments are used again
    window: int  # images of a segment that are shuffled together, rounded up to whole row groups


@dataclass(frozen=True)
class StreamOrder:
    """An `OrderPlan` for sources that are read in row groups: shuffles the groups, then images within windows."""

    sizes: tuple[int, ...]  # number of rows of each row group
    buffer: int  # images held in memory, in total over all processes and workers

    @cached_property
    def starts(self) -> Indices:
        """Index of the first row of each row group, followed by the total number of rows."""
        return np.cumsum([0, *self.sizes], dtype=np.int64)

    @property
    def mean_size(self) -> float:
        """Mean number of rows of a row group."""
        return float(self.starts[-1]) / len(self.sizes)

    def interleave(self, batch_size: int) -> Interleave:
        """Choose the number of segments that an epoch is cut into.

        It is the largest power of two for which one row group of each segment fits into ``buffer``, and a segment has
        at least two row groups on average.
        """
        room = min(self.buffer / self.mean_size, len(self.sizes) / 2)
        exponent = math.frexp(max(room, 1.0))[1] - 1
        width = math.gcd(2 ** -(-exponent // 2), batch_size)
        segments = 2**exponent
        return Interleave(width, segments // width, max(self.buffer // segments, math.ceil(self.mean_size)))

    def epoch(self, seed: int, epoch: int, order_variant: int, batch_size: int) -> EpochOrder:
        """See `OrderPlan.epoch`."""
        return StreamEpoch(self, (seed, epoch, order_variant), batch_size)

    def groups_held(self, batch_size: int, num_processes: int, num_workers: int) -> int:
        """See `OrderPlan.groups_held`."""
        layout = self.interleave(batch_size)
        extra = 0 if layout.width % num_processes == 0 else 1  # a process's part may begin within a segment
        width = min(max(layout.width // num_processes, 1) + extra, layout.width)
        cycle = layout.cycle // math.gcd(layout.cycle, max(num_workers, 1))
        return width * cycle * (math.ceil(layout.window / self.mean_size) + 1) + 1


@dataclass(frozen=True)
class StreamEpoch:
    """The batches of one epoch of a `StreamOrder`."""

    stream: StreamOrder
    key: tuple[int, int, int]  # seed, epoch and order variant
    batch_size: int  # of a global batch

    @cached_property
    def _layout(self) -> Interleave:
        return self.stream.interleave(self.batch_size)

    @cached_property
    def _group_order(self) -> Indices:
        return self._rng(GROUPS).permutation(len(self.stream.sizes))

    @cached_property
    def _group_ends(self) -> Indices:
        """Where each row group ends in the epoch's sequence."""
        return np.cumsum(np.array(self.stream.sizes, dtype=np.int64)[self._group_order])

    @cached_property
    def _segment_starts(self) -> Indices:
        """Where each segment begins, and the last one ends. Segments of the same part of a batch are adjacent."""
        steps, cycle = int(self.stream.starts[-1]) // self.batch_size, self._layout.cycle
        uses = np.array([len(range(turn, steps, cycle)) for turn in range(cycle)], dtype=np.int64)
        return np.cumsum([0, *np.tile(uses, self._layout.width) * self._part])

    @property
    def _part(self) -> int:
        """Images that a batch takes from a segment."""
        return self.batch_size // self._layout.width

    def batch(self, number: int, first: int, last: int) -> tuple[Indices, Indices]:
        """See `EpochOrder.batch`; no sample is repeated within an epoch."""
        use, turn = divmod(number, self._layout.cycle)
        taken, part = [], self._part
        for column in range(first // part, -(-last // part)):
            wanted = slice(max(first - column * part, 0), last - column * part)
            taken.append(self._part_of_segment(column * self._layout.cycle + turn, use * part)[wanted])
        return self._to_rows(np.concatenate(taken)), np.zeros(last - first, dtype=np.int64)

    def _part_of_segment(self, segment: int, start: int) -> Indices:
        """One batch's part of a segment, from position ``start`` of it on, shuffled within the segment's windows."""
        edges = self._windows(segment)
        first, last = np.searchsorted(edges, [start, start + self._part - 1], side="right")
        shuffled = [
            edges[window - 1] + self._rng(WINDOW, segment, window).permutation(edges[window] - edges[window - 1])
            for window in range(first, last + 1)
        ]
        skipped = start - edges[first - 1]
        return int(self._segment_starts[segment]) + np.concatenate(shuffled)[skipped : skipped + self._part]

    @cached_property
    def _windows(self) -> Callable[[int], Indices]:
        return cache(self._find_windows)

    def _find_windows(self, segment: int) -> Indices:
        """Where each window of a segment begins, and the last one ends. Windows consist of whole row groups."""
        begin, end = self._segment_starts[segment : segment + 2]
        low, high = np.searchsorted(self._group_ends, [begin, end], side="right")
        starts = self._group_ends[low:high] - begin  # of all row groups but the first
        # Windows of different segments are offset, so that not all row groups are needed in the same batch.
        shift = segment * self._layout.window // (len(self._segment_starts) - 1)
        numbers = (np.concatenate([[0], starts]) + shift) // self._layout.window
        return np.concatenate([[0], starts[np.diff(numbers) > 0], [end - begin]])

    def _to_rows(self, positions: Indices) -> Indices:
        """Rows of the source at positions of the epoch's sequence."""
        place = np.searchsorted(self._group_ends, positions, side="right")
        group = self._group_order[place]
        return self.stream.starts[group + 1] - (self._group_ends[place] - positions)

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.key[0], DrawPurpose.STREAM_ORDER, *purpose, *self.key[1:]])
