"""The order of samples as a pure function of (seed, epoch); workers, ranks and resume offsets are slices of it."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.batch import BadSample, Batch
from sslkit.data.formats.parquet_streams import StreamedRows
from sslkit.data.loading.replacement import read_or_replace
from sslkit.data.loading.shared_memory import PREFETCH
from sslkit.data.loading.worker_status import Posts
from sslkit.data.order.mixture import Mixture
from sslkit.data.order.stream_order import Lanes
from sslkit.data.sources.image_source import ImageSource

Key = tuple[int, int]  # (epoch, sample)
Take = Callable[[int, int, int], tuple[NDArray[np.int64], NDArray[np.int64]]]  # samples, and how often each came before
WORKER_GRACE = 30  # seconds a worker lives on after SIGTERM


def epoch_order(seed: int, epoch: int, num_samples: int, detour: int = 0) -> NDArray[np.int64]:
    """The permutation of ``range(num_samples)`` that an epoch follows; the tail short of a batch is dropped.

    ``detour`` counts how often the run went back to a checkpoint to take another order from there.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch + (detour << 32)]))
    return generator.permutation(num_samples)


class GlobalBatches(Sampler[list[Key]]):
    """Yields this rank's keys of each global batch, from ``start_step`` to ``total_steps``, across epochs.

    Global batch ``i`` of an epoch is rows ``[i * N, (i + 1) * N)`` of `epoch_order`, or of a `Mixture`'s samples in
    that order, or what a stream's `Lanes` say; rank ``r`` of ``W`` takes the ``r``-th of its ``W`` equal parts. Neither
    the order nor the batches depend on ``W``.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        total_steps: int,
        detour: int = 0,
        plan: Mixture | Lanes | None = None,
    ) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.start_step, self.total_steps, self.detour = start_step, total_steps, detour
        self.plan = plan
        self.steps_per_epoch = num_samples // batch_size

    def starting_at(self, step: int) -> "GlobalBatches":
        """The same batches from another step on."""
        return GlobalBatches(
            self.num_samples,
            self.batch_size,
            self.seed,
            rank=self.rank,
            world_size=self.world_size,
            start_step=step,
            total_steps=self.total_steps,
            detour=self.detour,
            plan=self.plan,
        )

    def __len__(self) -> int:
        return self.total_steps - self.start_step

    def __iter__(self) -> Iterator[list[Key]]:
        local = self.batch_size // self.world_size
        first, last = self.rank * local, (self.rank + 1) * local
        epochs = groupby(range(self.start_step, self.total_steps), lambda step: step // self.steps_per_epoch)
        for epoch, steps in epochs:
            take = self._epoch(epoch)
            for step in steps:
                samples, repeats = take(step % self.steps_per_epoch, first, last)
                # An image that comes again in an epoch is cut as in an epoch far away: other draws, no equal views.
                yield [(epoch + (int(time) << 32), int(each)) for time, each in zip(repeats, samples, strict=True)]

    def _epoch(self, epoch: int) -> Take:
        """The function of a batch of the epoch, and of its first and last image."""
        if isinstance(self.plan, Lanes):
            lanes = self.plan.epoch((self.seed, epoch, self.detour), self.batch_size)
            return lambda batch, first, last: (lanes.rows(batch, first, last), np.zeros(last - first, dtype=np.int64))
        order = epoch_order(self.seed, epoch, self.num_samples, self.detour)
        repeats = np.zeros_like(order)
        if self.plan is not None:
            samples, repeats = self.plan.samples(self.seed, epoch)
            order, repeats = samples[order], repeats[order]

        def take(batch: int, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            here = slice(batch * self.batch_size + first, batch * self.batch_size + last)
            return order[here], repeats[here]

        return take


class Item(NamedTuple):
    """A sample's views, the image they show, what could not be read, and what is still to be done to the views."""

    views: list[NDArray[np.uint8]]
    shown: int
    bad: tuple[BadSample, ...]
    view_params: list[NDArray[np.float32]]


class ViewDataset(Dataset[Item]):
    """Decodes a sample once and cuts its views; asked for by (epoch, sample).

    The random parameters of the views are those of the sample that was asked for, even if another image replaces it.
    """

    def __init__(self, source: ImageSource, pipeline: ViewPipeline, posts: Posts | None = None) -> None:
        self.source, self.pipeline, self.posts = source, pipeline, posts

    def __getitem__(self, key: Key) -> Item:
        epoch, sample = key
        if self.posts is not None:
            self.posts.begin(sample)
        fits = partial(self.pipeline.reduction, epoch, sample)
        found = read_or_replace(self.source, self.pipeline.seed, epoch, sample, fits)
        if self.pipeline.config.device == "accelerator":
            views, params = self.pipeline.crop_views(found.pixels, epoch, sample, found.size)
        else:
            views, params = self.pipeline(found.pixels, epoch, sample, found.size), []
        if self.posts is not None:
            self.posts.end()
        return Item(views, found.index, found.bad, params)


def make_loader(
    source: ImageSource,
    pipeline: ViewPipeline,
    batches: GlobalBatches,
    *,
    workers: int,
    pin_memory: bool,
    timeout: float = 0.0,
    posts: Posts | None = None,
    prefetch: int = PREFETCH,
) -> "DataLoader[Batch]":
    """A loader over the whole rest of the run; its workers live as long as it does.

    Args:
        source: Images; labels are not looked at.
        pipeline: Cuts the views.
        batches: Which samples, in which order.
        workers: Processes; 0 works in this one.
        pin_memory: Whether batches are copied to pinned pages.
        timeout: Seconds after which waiting for workers is an error; 0 waits for ever.
        posts: Where workers write what they are at, or None.
        prefetch: Batches that each worker makes ahead.
    """
    if isinstance(source.table, StreamedRows) and isinstance(batches.plan, Lanes):
        held = batches.plan.groups_held(batches.batch_size, batches.world_size, workers)
        source = replace(source, table=source.table.holding(held))
    loader: DataLoader[Any] = DataLoader(
        ViewDataset(source.without_labels(), pipeline, posts),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        prefetch_factor=prefetch if workers else None,
        timeout=timeout if workers else 0.0,
    )
    return loader


def resolve_workers(asked: int | str, *, on_accelerator: bool, processes_here: int) -> int:
    """How many workers a process starts; ``"auto"`` shares this machine's cores among its processes.

    Where the model computes on the CPU, most cores are the model's: a quarter go to workers, none if there is one.
    """
    if isinstance(asked, int):
        return asked
    cores = cores_of_a_process(processes_here)
    return min(cores, 16) if on_accelerator else min(max(cores // 4, 1), cores - 1)


def cores_of_a_process(processes_here: int) -> int:
    """This machine's cores, shared among the processes on it; those of its own where it is a task of Slurm's."""
    cores, own = len(os.sched_getaffinity(0)), os.environ.get("SLURM_CPUS_PER_TASK", "")
    if own and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun's processes share the cores of one task
        return min(cores, int(own))
    return max(cores // processes_here, 1)


def _collate(items: list[Item]) -> Batch:
    views = [torch.from_numpy(np.stack(view)) for view in zip(*(item.views for item in items), strict=True)]
    params = tuple(torch.from_numpy(np.stack(rows)) for rows in zip(*(item.view_params for item in items), strict=True))
    bad = tuple(each for item in items for each in item.bad)
    return Batch(views, torch.tensor([item.shown for item in items]), bad, params)


def start_worker(_worker: int) -> None:
    """What every data worker does first: one thread, and no signal of its own.

    A scheduler or a terminal signals the whole group. That is for the process that trains: it needs one more batch to
    stop well. A worker that nobody asks any more leaves by itself.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
