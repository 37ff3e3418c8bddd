"""kNN accuracy on a labelled set while training, shared among the processes."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sslkit.data.augment.views_config import ViewsConfig
from sslkit.data.loading.shared_memory import fitting_workers
from sslkit.data.sources.image_source import ImageSource
from sslkit.distributed.collectives import broadcast_buffers, gather_rows, rank, world_size
from sslkit.engine.logging.sample_images import DrawImage, neighbours_image
from sslkit.errors import UserError
from sslkit.evaluate.features.extraction import batch_bytes, extract_features
from sslkit.evaluate.features.readouts import Readout
from sslkit.evaluate.features.transforms import evaluation_transform
from sslkit.evaluate.labelled_data import LabelledPair, open_pair
from sslkit.evaluate.probes.knn import KnnProtocol, knn_accuracy
from sslkit.evaluate.protocol import data_settings, preprocessing_settings
from sslkit.recipe.resolve import Recipe

BATCH = 256  # images at a time


class KnnMonitor:
    """Measures the kNN accuracy of an encoder as `sslkit eval knn` does, with data and settings of ``[monitor]``."""

    def __init__(self, recipe: Recipe, device: torch.device, workers: int) -> None:
        monitor = recipe.monitor
        self.transform = evaluation_transform(preprocessing_of(recipe.views))
        self.device, self.workers = device, workers
        data = monitor.source().model_copy(update={"background": recipe.data.background})
        pair = open_pair(data, data.split, seed=recipe.train.seed)
        self.pair = _limit_bank(pair, monitor.max_train, recipe.train.seed)
        self.protocol = KnnProtocol(min(monitor.k, len(self.pair.train)), monitor.temperature)
        self.batch_bytes = batch_bytes(self.transform, BATCH) if workers else 0
        self.left_out, self.scored, self.views = 0, len(self.pair.test), recipe.views
        self.seed = recipe.train.seed

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The protocol, as `sslkit eval knn` writes it for the same score."""
        others = Readout().settings(), preprocessing_settings(preprocessing_of(self.views)), data_settings(self.pair)
        return self.protocol.settings(*others)

    def __call__(self, backbone: nn.Module, show: Callable[[DrawImage], None] = lambda _draw: None) -> float:
        """Share of the test images that are classified correctly by the features of ``backbone``, (B, D).

        Images that cannot be read, such as deleted files, are left out of bank and test and counted in ``left_out``;
        ``scored`` counts the test images that remain. ``show`` gets a function that draws some of them beside their
        nearest neighbours. Raises a UserError if too few images can be read, or features are not finite.
        """
        broadcast_buffers(backbone)
        bank, kept = self._features(backbone, self.pair.train)
        queries, asked = self._features(backbone, self.pair.test)
        self.left_out, self.scored = int((~kept).sum() + (~asked).sum()), int(asked.sum())
        if kept.sum() < self.protocol.k or not asked.any():
            raise UserError(f"[monitor] data: {self.left_out} images of {self.pair.description} cannot be read")
        if not (bank[kept].isfinite().all() and queries[asked].isfinite().all()):
            raise UserError("the features are not finite")
        show(partial(neighbours_image, self.pair, bank, kept, queries, asked, self.seed))
        labels, truth = self.pair.train_labels[kept], self.pair.test_labels[asked]
        return knn_accuracy(bank[kept], labels, queries[asked], truth, self.protocol)

    def _features(self, backbone: nn.Module, source: ImageSource) -> tuple[Tensor, Tensor]:
        """Features (N, D), and which of the images can be read, (N,) bool."""
        # Each process encodes every world-size-th image. The last ones wrap around, so that all encode as many.
        share = -(-len(source) // world_size())
        own = (rank() + world_size() * np.arange(share)) % len(source)
        unreadable: list[int] = []
        features = extract_features(
            backbone,
            source.subset(own),
            self.transform,
            device=self.device,
            workers=fitting_workers(self.batch_bytes, self.workers),
            batch_size=BATCH,
            unreadable=unreadable,
        )
        readable = torch.ones(share, 1)
        readable[unreadable] = 0.0
        gathered = gather_rows(torch.cat([features, readable], dim=1).to(self.device)).cpu()
        interleaved = gathered.view(world_size(), share, -1).transpose(0, 1).flatten(0, 1)[: len(source)]
        return interleaved[:, :-1], interleaved[:, -1] > 0


def preprocessing_of(views: ViewsConfig) -> dict[str, Any]:
    """The preprocessing of images for evaluation, under the names that timm uses."""
    size = (views.channels, views.size, views.size)
    crop: dict[str, Any] = {"input_size": size, "interpolation": views.interpolation}
    return crop | {"mean": views.mean, "std": views.std, "crop_pct": views.crop_pct}


def check_neighbours(monitor: KnnMonitor, k: int) -> None:
    """Raise a UserError if the bank has fewer than ``k`` images; names the largest k that fits.

    Not for runs that are continued: earlier versions silently used fewer neighbours.
    """
    bank = len(monitor.pair.train)
    if k > bank:
        raise UserError(
            f"[monitor] k: {k} neighbours are more than the {bank} images of the bank "
            f"({monitor.pair.description}); set k = {bank} or less"
        )


def _limit_bank(pair: LabelledPair, max_train: int, seed: int) -> LabelledPair:
    if not max_train or max_train >= len(pair.train):
        return pair
    chosen = np.sort(np.random.default_rng(seed).permutation(len(pair.train))[:max_train])
    labels = pair.train_labels[torch.from_numpy(chosen)]
    return replace(pair, train=pair.train.subset(chosen), train_labels=labels)


def make_knn_monitor(recipe: Recipe, device: torch.device, workers: int) -> KnnMonitor | None:
    """The kNN monitor that ``[monitor]`` asks for, or None."""
    return KnnMonitor(recipe, device, workers) if recipe.monitor.every_epochs else None
