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
from sslkit.evaluate.features.transforms import Transform, evaluation_transform
from sslkit.evaluate.labelled_data import LabelledPair, open_pair
from sslkit.evaluate.probes.knn import KnnProtocol, count_classes, is_correct, predict, share_of
from sslkit.evaluate.protocol import data_settings, preprocessing_settings
from sslkit.recipe.resolve import Recipe

BATCH = 256  # images at a time
GATHERED = 4096  # rows at a time, which bounds the memory on the device


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
        bank, kept = self.features(backbone, self.pair.train)
        queries, asked = self.features(backbone, self.pair.test)
        self.left_out, self.scored = int((~kept).sum() + (~asked).sum()), int(asked.sum())
        if kept.sum() < self.protocol.k or not asked.any():
            raise UserError(f"[monitor] data: {self.left_out} images of {self.pair.description} cannot be read")
        self.kept, self.asked = kept, asked
        self.correct = self.classify(bank, queries)
        show(partial(neighbours_image, self.pair, bank, kept, queries, asked, self.seed))
        return share_of(self.correct)

    def classify(self, bank: Tensor, queries: Tensor, *, centre: bool = False) -> Tensor:
        """Which of the test images that were readable are classified correctly, bool, by features of all images.

        ``centre`` subtracts the bank's mean. Raises a UserError if features are not finite.
        """
        bank, queries = bank[self.kept], queries[self.asked]
        if not (bank.isfinite().all() and queries.isfinite().all()):
            raise UserError("the features are not finite")
        labels, truth = self.pair.train_labels[self.kept], self.pair.test_labels[self.asked]
        protocol = replace(self.protocol, centre=centre)
        [predicted] = predict(queries, bank, labels, count_classes(labels, truth), [protocol])
        return is_correct(predicted, truth)

    def features(
        self, backbone: nn.Module, source: ImageSource, transform: Transform | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features (N, D), and which of the images can be read, (N,) bool. Default: the encoder's transform."""
        # Each process encodes every world-size-th image. The last ones wrap around, so that all encode as many.
        share = -(-len(source) // world_size())
        own = (rank() + world_size() * np.arange(share)) % len(source)
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
        readable = torch.ones(share, 1)
        readable[unreadable] = 0.0
        parts = torch.cat([features, readable], dim=1).split(GATHERED)
        gathered = [gather_rows(part.to(self.device)).cpu().unflatten(0, (world_size(), -1)) for part in parts]
        interleaved = torch.cat(gathered, dim=1).transpose(0, 1).flatten(0, 1)[: len(source)]
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
