"""kNN accuracy on a labelled set while training. Each process keeps the features that it computes on its device."""

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
from sslkit.distributed.collectives import broadcast_buffers
from sslkit.engine.logging.sample_images import NEIGHBOURS, DrawImage, neighbours_image
from sslkit.errors import UserError
from sslkit.evaluate.features.extraction import batch_bytes, extract_features
from sslkit.evaluate.features.readouts import Readout
from sslkit.evaluate.features.transforms import Transform, evaluation_transform
from sslkit.evaluate.labelled_data import LabelledPair, open_pair
from sslkit.evaluate.probes.knn import KnnProtocol, count_classes, is_correct, share_of
from sslkit.evaluate.probes.sharded_bank import Shard, in_order, own_images, predict_by_shards
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
        bank, queries = (self.features(backbone, source) for source in (self.pair.train, self.pair.test))
        self.kept, self.asked = kept, asked = bank.readable, queries.readable
        self.left_out, self.scored = int((~kept).sum() + (~asked).sum()), int(asked.sum())
        if kept.sum() < self.protocol.k or not asked.any():
            raise UserError(f"[monitor] data: {self.left_out} images of {self.pair.description} cannot be read")
        self.correct, nearest_rows = self._search(bank, queries, self.protocol)
        show(partial(neighbours_image, self.pair, nearest_rows, asked, self.seed))
        return share_of(self.correct)

    def classify(self, bank: Shard, queries: Shard, *, centre: bool = False) -> Tensor:
        """Which of the test images that were readable are classified correctly, bool, by features of all images.

        ``centre`` subtracts the bank's mean. Raises a UserError if features are not finite.
        """
        return self._search(bank, queries, replace(self.protocol, centre=centre))[0]

    def _search(self, bank: Shard, queries: Shard, protocol: KnnProtocol) -> tuple[Tensor, Tensor]:
        """Which test images are classified correctly, and the rows of the images nearest to each."""
        bank, queries = replace(bank, readable=self.kept), replace(queries, readable=self.asked)
        if not (bank.is_finite() and queries.is_finite()):
            raise UserError("the features are not finite")
        truth = self.pair.test_labels[self.asked]
        classes = count_classes(self.pair.train_labels[self.kept], truth)
        predicted, nearest_rows = predict_by_shards(
            queries, bank, self.pair.train_labels, classes, protocol, most=NEIGHBOURS
        )
        return is_correct(predicted[self.asked], truth), nearest_rows

    def features(self, backbone: nn.Module, source: ImageSource, transform: Transform | None = None) -> Shard:
        """Features of this process's images, where they were computed. Default: the encoder's transform."""
        own = own_images(len(source))
        unreadable: list[int] = []
        features = extract_features(
            backbone,
            source.subset(own),
            transform or self.transform,
            device=self.device,
            workers=fitting_workers(self.batch_bytes, self.workers),
            batch_size=BATCH,
            unreadable=unreadable,
        )
        readable = torch.ones(len(own))
        readable[unreadable] = 0.0
        return Shard(features, in_order(readable.to(self.device), len(source)).cpu() > 0, self.device)


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
