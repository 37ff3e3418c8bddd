"""Diagnostics of the features while training, without labels: whether they collapse, and whether gradients spike.

Every few steps the first images of the batch are encoded once more, in eval mode and without a graph, as the features
of the step itself differ between methods. When kNN is measured, the images are a fixed sample of the data in eight
views, as LiDAR needs. Training is not affected: no random number is drawn, and no batch statistics change.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sslkit.data.augment.cpu import Normaliser, ViewPipeline
from sslkit.data.augment.views_config import NUM_GLOBAL_VIEWS
from sslkit.data.loading.replacement import read_or_replace
from sslkit.data.sources.image_source import ImageSource
from sslkit.distributed.collectives import broadcast_buffers, gather_rows, rank, world_size
from sslkit.engine.monitor.alarms import Spike, SpikeDetector, collapse_alarm, spike_alarm
from sslkit.evaluate.features.devices import Download
from sslkit.evaluate.label_free.collapse_metrics import label_free_metrics
from sslkit.files.jsonl_reader import number
from sslkit.recipe.resolve import Recipe

MAX_IMAGES = 256  # over all processes: enough to see a collapse, and cheap beside fifty batches
CHUNK = 64
PAIRS = 4  # pairs of views of an image for LiDAR; the paper has 50 views
NOT_WRITTEN = ("pretext_top1",)  # metrics.jsonl has that of the method


class Diagnostics:
    """Computes the lines of diagnostics.jsonl. All processes call it at the same steps; the first gets the numbers."""

    def __init__(self, recipe: Recipe, source: ImageSource, accelerator: Accelerator) -> None:
        self.recipe, self.source, self.accelerator = recipe, source, accelerator
        self.pipeline = ViewPipeline(recipe.views, recipe.train.seed)
        self.share = min(MAX_IMAGES, recipe.train.batch_size) // world_size()
        self.chunk = min(recipe.train.micro_batch or CHUNK, CHUNK)
        order = source.sample(self.share * world_size(), recipe.train.seed)
        self.sample = order[rank() * self.share : (rank() + 1) * self.share]
        self.normalise = Normaliser(recipe.views.mean, recipe.views.std)
        self.detector = SpikeDetector()
        self.spikes: list[Spike] = []
        self.highest_rank = 0.0
        self.data_alarms: list[str] = []  # raised at the start, for the first line

    def resume(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Continue from the lines of diagnostics.jsonl that the run has written before."""
        ranks = (number(line.get("effective_rank")) for line in lines)
        self.highest_rank = max((rank for rank in ranks if rank is not None), default=0.0)

    def observe(self, step: int, grad_norm: float, layers: Mapping[str, float]) -> None:
        """Record a step's gradient norm, over all parameters and by layer."""
        spike = self.detector.update(step, grad_norm, layers)
        if spike is not None:
            self.spikes.append(spike)

    def is_due(self, step: int) -> bool:
        """Whether to encode the batch after ``step`` steps; the first is included, as a baseline of the collapse."""
        return step == 1 or step % self.recipe.monitor.diagnose_every == 0

    def of_batch(self, backbone: nn.Module, views: Sequence[Tensor]) -> dict[str, Any]:
        """Numbers and alarms from the first two views of this process's batch, uint8, each (B, H, W, 3).

        They have their keys in diagnostics.jsonl. The mode of ``backbone`` is restored.
        """
        return self.start_of_batch(backbone, views)()

    def start_of_batch(self, backbone: nn.Module, views: Sequence[Tensor]) -> Callable[[], dict[str, Any]]:
        """Encode the views; the function returned computes the numbers, in any thread, before the next start."""
        pairs = (view[: self.share].split(self.chunk) for view in views[:NUM_GLOBAL_VIEWS])
        return self._start(backbone, zip(*pairs, strict=True))

    def of_sample(self, backbone: nn.Module) -> dict[str, Any]:
        """The same, and LiDAR, from a fixed sample of the data in eight views."""
        return self._start(backbone, self._cut_sample())()

    def _cut_sample(self) -> Iterator[list[Tensor]]:
        for start in range(0, self.share, self.chunk):
            indices = [int(index) for index in self.sample[start : start + self.chunk]]
            seed = self.recipe.train.seed
            images = [read_or_replace(self.source, seed, epoch=0, sample=index).pixels for index in indices]
            # The views of the first epochs of the run.
            cut = [
                [
                    self.pipeline.make_view(image, epoch, index, view)
                    for image, index in zip(images, indices, strict=True)
                ]
                for epoch in range(PAIRS)
                for view in range(NUM_GLOBAL_VIEWS)
            ]
            yield [torch.from_numpy(np.stack(view)) for view in cut]

    def _start(self, backbone: nn.Module, chunks: Iterable[Sequence[Tensor]]) -> Callable[[], dict[str, Any]]:
        spikes, self.spikes = self.spikes, []
        data_alarms, self.data_alarms = self.data_alarms, []
        features = self._encode(backbone, chunks)
        if not self.accelerator.is_main_process:
            return dict
        return partial(self._line, Download(features), data_alarms + spike_alarm(spikes))

    def _line(self, download: Download, alarms: list[str]) -> dict[str, Any]:
        features = download.wait()
        if not features.isfinite().all():
            return {"alarms": ["collapse: features are not finite; try a lower [optim] lr", *alarms]}
        numbers = label_free_metrics(features)
        self.highest_rank = max(self.highest_rank, numbers.effective_rank)
        spread = numbers.embedding_std, numbers.effective_rank, features.shape[2]
        alarms = collapse_alarm(*spread, self.highest_rank) + alarms
        line = {name: value for name, value in numbers.to_dict().items() if name not in NOT_WRITTEN}
        return {**line, "alarms": alarms}

    @torch.no_grad()
    def _encode(self, backbone: nn.Module, chunks: Iterable[Sequence[Tensor]]) -> Tensor:
        """Features (N, Q, D) of all processes' images."""
        broadcast_buffers(backbone)
        device = self.accelerator.device
        encoded = []
        with _in_eval_mode(backbone), self.accelerator.autocast():
            for chunk in chunks:
                inputs = [self.normalise(view.to(device)) for view in chunk]
                encoded.append(torch.stack([backbone(each).float() for each in inputs], dim=1))
        return gather_rows(torch.cat(encoded))


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put each submodule in eval mode, and afterwards back in the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
