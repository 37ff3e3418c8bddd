"""What is watched while training without a label: do features collapse, and is the run in trouble.

The seam is the backbone and the data: every method learns a backbone from two large views of each image. Every so many
steps the first images of the batch go through the backbone once more, in eval mode and without a graph. (What a step
computes anyway is another thing for each method: one view or two, of the student or of the teacher, with or without
batch statistics.) When kNN is measured, the images are a fixed sample of the data, in eight views, as LiDAR needs.

Nothing of it reaches training: no draw from a generator, no batch statistics, no gradient.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sslkit.data.augment.cpu import ViewPipeline, normalise
from sslkit.data.augment.policies import LARGE_VIEWS
from sslkit.data.loading.replacement import read_or_replace
from sslkit.data.sources.image_source import ImageSource
from sslkit.distributed.collectives import copy_buffers_from_first, gather_rows, rank, world_size
from sslkit.engine.monitor.alarms import Spike, SpikeWatch, collapse_alarm, spike_alarm
from sslkit.evaluate.label_free.collapse_metrics import label_free_metrics
from sslkit.files.jsonl_reader import number
from sslkit.recipe.resolve import Recipe

IMAGES = 256  # at most, over all processes: enough to see a collapse, and few beside fifty batches
CHUNK = 64
ROUNDS = 4  # pairs of views of an image for LiDAR; the paper has 50 views
NOT_WRITTEN = ("pretext_top1",)  # metrics.jsonl has the task's own


class Diagnostics:
    """Makes the lines of diagnostics.jsonl. All processes call it at the same steps; the first gets the numbers.

    Args:
        recipe: Its ``[monitor]`` table says how often.
        source: Images that the run learns from.
        accelerator: Device and precision of the forward passes.
    """

    def __init__(self, recipe: Recipe, source: ImageSource, accelerator: Accelerator) -> None:
        self.recipe, self.source, self.accelerator = recipe, source, accelerator
        self.pipeline = ViewPipeline(recipe.views, recipe.train.seed)
        self.share = min(IMAGES, recipe.train.batch_size) // world_size()
        self.chunk = min(recipe.train.micro_batch or CHUNK, CHUNK)
        order = source.draw(self.share * world_size(), recipe.train.seed)
        self.sample = order[rank() * self.share : (rank() + 1) * self.share]
        self.watch = SpikeWatch()
        self.spikes: list[Spike] = []
        self.highest_rank = 0.0
        self.of_data: list[str] = []  # alarms at the start, for the first line

    def remember(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take up from the lines of diagnostics.jsonl that a run left which is now continued."""
        ranks = (number(line.get("effective_rank")) for line in lines)
        self.highest_rank = max((rank for rank in ranks if rank is not None), default=0.0)

    def see(self, step: int, grad_norm: float, layers: Mapping[str, float]) -> None:
        """Look at a step's gradient norm, whole and by layer."""
        spike = self.watch.see(step, grad_norm, layers)
        if spike is not None:
            self.spikes.append(spike)

    def is_due(self, done: int) -> bool:
        """Whether to look at the batch after so many steps; after the first too, to know what features fall from."""
        return done == 1 or done % self.recipe.monitor.diagnose_every == 0

    def of_batch(self, backbone: nn.Module, views: Sequence[Tensor]) -> dict[str, Any]:
        """Numbers and alarms from the first images of this process's batch, by their keys in diagnostics.jsonl.

        Args:
            backbone: (B, 3, H, W) -> (B, D); left as it came.
            views: uint8, each (B, H, W, 3); the first two are looked at.
        """
        pairs = (view[: self.share].split(self.chunk) for view in views[:LARGE_VIEWS])
        return self._line(backbone, zip(*pairs, strict=True))

    def of_sample(self, backbone: nn.Module) -> dict[str, Any]:
        """The same, with LiDAR, from a fixed sample of the data in eight views."""
        return self._line(backbone, self._cut_sample())

    def _cut_sample(self) -> Iterator[list[Tensor]]:
        for start in range(0, self.share, self.chunk):
            indices = [int(index) for index in self.sample[start : start + self.chunk]]
            seed = self.recipe.train.seed
            images = [read_or_replace(self.source, seed, epoch=0, sample=index).pixels for index in indices]
            # The views of the run's first epochs: what it is trained on.
            cut = [
                [self.pipeline.cut(image, epoch, index, view) for image, index in zip(images, indices, strict=True)]
                for epoch in range(ROUNDS)
                for view in range(LARGE_VIEWS)
            ]
            yield [torch.from_numpy(np.stack(view)) for view in cut]

    def _line(self, backbone: nn.Module, chunks: Iterable[Sequence[Tensor]]) -> dict[str, Any]:
        spikes, self.spikes = self.spikes, []
        of_data, self.of_data = self.of_data, []
        features = self._encode(backbone, chunks)
        if not self.accelerator.is_main_process:
            return {}
        alarms = of_data + spike_alarm(spikes)
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
        copy_buffers_from_first(backbone)
        views, device = self.recipe.views, self.accelerator.device
        encoded = []
        with _in_eval_mode(backbone), self.accelerator.autocast():
            for chunk in chunks:
                inputs = [normalise(view.to(device), views.mean, views.std) for view in chunk]
                encoded.append(torch.stack([backbone(each).float() for each in inputs], dim=1))
        return gather_rows(torch.cat(encoded)).cpu()


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Each part in eval mode, and afterwards in the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
