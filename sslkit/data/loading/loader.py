"""A PyTorch DataLoader that decodes images and makes their views."""

import os
import signal
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.augment.device_plan import plan_views
from sslkit.data.batch import BadSample, Batch
from sslkit.data.loading.replacement import read_or_replace
from sslkit.data.loading.shared_memory import PREFETCH
from sslkit.data.loading.worker_status import StatusBoard
from sslkit.data.order.sampler import GlobalBatchSampler, Key
from sslkit.data.sources.image_source import ImageSource

WORKER_GRACE = 30  # seconds that a worker continues after SIGTERM


class Item(NamedTuple):
    """A sample as a worker returns it; see `Batch`."""

    views: list[NDArray[np.uint8]]  # (size, size, 3) each
    shown: int  # index of the image that the views show
    bad: tuple[BadSample, ...]
    view_params: list[NDArray[np.float32]]


class ViewDataset(Dataset[Item]):
    """Decodes each sample once and makes its views; indexed by (epoch, sample).

    The random parameters of the views are those of the requested sample, even if another image replaces it.
    """

    def __init__(self, source: ImageSource, pipeline: ViewPipeline, status: StatusBoard | None = None) -> None:
        self.source, self.pipeline, self.status = source, pipeline, status or StatusBoard(0)

    def __getitem__(self, key: Key) -> Item:
        epoch, sample = key
        self.status.write(sample)
        reduction = partial(self.pipeline.reduction, epoch, sample)
        image = read_or_replace(self.source, self.pipeline.seed, epoch, sample, reduction)
        if self.pipeline.config.device == "accelerator":
            views, params = self.pipeline.crop_views(image.pixels, epoch, sample, image.size)
        else:
            views, params = self.pipeline(image.pixels, epoch, sample, image.size), []
        self.status.write()
        return Item(views, image.index, image.bad, params)


def make_loader(
    source: ImageSource,
    pipeline: ViewPipeline,
    batches: GlobalBatchSampler,
    *,
    workers: int,
    pin_memory: bool,
    timeout: float = 0.0,
    status: StatusBoard | None = None,
    prefetch: int = PREFETCH,
) -> "DataLoader[Batch]":
    """Make a loader over all batches of ``batches``, across epochs; its workers live as long as it does.

    Labels of ``source`` are not read. Without workers, this process loads.

    Args:
        timeout: Seconds to wait for a batch before an error; 0 waits forever.
        status: Where workers record the sample they work on.
        prefetch: Batches that each worker loads ahead.
    """
    source = source.without_labels()
    if batches.plan is not None:
        source = source.holding(batches.plan.groups_held(batches.batch_size, batches.world_size, workers))
    loader: DataLoader[Any] = DataLoader(
        ViewDataset(source, pipeline, status),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(_collate, pipeline=pipeline),
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        prefetch_factor=prefetch if workers else None,
        timeout=timeout if workers else 0.0,
    )
    return loader


def resolve_workers(asked: int | str, *, on_accelerator: bool, processes_here: int) -> int:
    """Number of workers per process; ``"auto"`` divides the cores of this machine among its processes.

    If the model runs on the CPU, it needs most cores: a quarter of them go to workers, none if there is only one core.
    """
    if isinstance(asked, int):
        return asked
    cores = cores_of_a_process(processes_here)
    return min(cores, 16) if on_accelerator else min(max(cores // 4, 1), cores - 1)


def cores_of_a_process(processes_here: int) -> int:
    """Cores of this machine divided by the processes on it, or the cores that Slurm gives each of its tasks."""
    cores, own = len(os.sched_getaffinity(0)), os.environ.get("SLURM_CPUS_PER_TASK", "")
    if own and "TORCHELASTIC_RUN_ID" not in os.environ:  # processes of torchrun share the cores of one task
        return min(cores, int(own))
    return max(cores // processes_here, 1)


def _collate(items: list[Item], pipeline: ViewPipeline) -> Batch:
    views = [torch.from_numpy(np.stack(view)) for view in zip(*(item.views for item in items), strict=True)]
    bad = tuple(sample for item in items for sample in item.bad)
    params = [np.stack(rows) for rows in zip(*(item.view_params for item in items), strict=True)]
    plan = plan_views(params, pipeline.policies, pipeline.sides) if params else None
    return Batch(views, torch.tensor([item.shown for item in items]), bad, plan)


def start_worker(_worker: int) -> None:
    """Initialise a data worker: single-threaded, ignoring SIGINT and SIGUSR1; SIGTERM ends it after `WORKER_GRACE`.

    Schedulers and terminals signal the whole process group, but the training process needs one more batch to stop
    cleanly. A worker whose parent process has ended exits by itself.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
