"""The order of samples as a pure function of (seed, epoch); workers, ranks and resume offsets are slices of it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sslkit.data.source import ImageSource
from sslkit.data.views import ViewPipeline

Key = tuple[int, int]  # (epoch, sample)


@dataclass(frozen=True)
class Batch:
    """One process's part of a global batch.

    Attributes:
        views: One (B, size, size, 3) uint8 tensor per view.
        sample_ids: (B,) int64, positions in the source.
    """

    views: list[Tensor]
    sample_ids: Tensor

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader; pinned pages make the copy to a GPU asynchronous."""
        return Batch([view.pin_memory() for view in self.views], self.sample_ids.pin_memory())


def epoch_order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """The permutation of ``range(num_samples)`` that an epoch follows; the tail short of a batch is dropped."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return generator.permutation(num_samples)


class GlobalBatches(Sampler[list[Key]]):
    """Yields this rank's keys of each global batch, from ``start_step`` to ``total_steps``, across epochs.

    Global batch ``i`` of an epoch is rows ``[i * N, (i + 1) * N)`` of `epoch_order`; rank ``r`` of ``W`` takes the
    ``r``-th of its ``W`` equal parts. Neither the order nor the batches depend on ``W``.
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
    ) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.start_step, self.total_steps = start_step, total_steps
        self.steps_per_epoch = num_samples // batch_size

    def __len__(self) -> int:
        return self.total_steps - self.start_step

    def __iter__(self) -> Iterator[list[Key]]:
        local = self.batch_size // self.world_size
        current, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start_step, self.total_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != current:
                current, order = epoch, epoch_order(self.seed, epoch, self.num_samples)
            first = position * self.batch_size + self.rank * local
            yield [(epoch, int(sample)) for sample in order[first : first + local]]


class ViewDataset(Dataset[tuple[list[NDArray[np.uint8]], int]]):
    """Decodes a sample once and cuts its views; asked for by (epoch, sample)."""

    def __init__(self, source: ImageSource, pipeline: ViewPipeline) -> None:
        self.source, self.pipeline = source, pipeline

    def __getitem__(self, key: Key) -> tuple[list[NDArray[np.uint8]], int]:
        epoch, sample = key
        return self.pipeline(self.source.read(sample), epoch, sample), sample


def make_loader(
    source: ImageSource, pipeline: ViewPipeline, batches: GlobalBatches, *, workers: int, pin_memory: bool
) -> "DataLoader[Batch]":
    """A loader over the whole rest of the run; its workers live as long as it does."""
    loader: DataLoader[Any] = DataLoader(
        ViewDataset(source.without_labels(), pipeline),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        prefetch_factor=4 if workers else None,
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
    """This machine's cores, shared among the processes on it."""
    return max(len(os.sched_getaffinity(0)) // processes_here, 1)


def _collate(samples: list[tuple[list[NDArray[np.uint8]], int]]) -> Batch:
    views = [torch.from_numpy(np.stack(view)) for view in zip(*(views for views, _ in samples), strict=True)]
    return Batch(views, torch.tensor([sample for _, sample in samples]))


def _start_worker(_worker: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
