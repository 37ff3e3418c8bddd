"""What is watched while training: kNN on a labelled set, shared among the processes, and gradients by layer."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sslkit.data.augment.policies import ViewsConfig
from sslkit.data.loading.shared_memory import fitting_workers
from sslkit.data.sources.image_source import ImageSource
from sslkit.distributed.collectives import copy_buffers_from_first, gather_rows, rank, world_size
from sslkit.engine.logging.sample_images import Draw, neighbour_sheet
from sslkit.errors import UserError
from sslkit.evaluate.features.extraction import batch_bytes, extract_features
from sslkit.evaluate.features.readouts import Readout
from sslkit.evaluate.features.transforms import Transform
from sslkit.evaluate.labelled_data import LabelledPair, open_pair
from sslkit.evaluate.probes.knn import KnnProtocol, knn_accuracy
from sslkit.evaluate.protocol import data_settings, preprocessing_settings
from sslkit.recipe.resolve import Recipe

BATCH = 256  # images at a time


class KnnMonitor:
    """Scores the student's backbone by kNN on features, as `sslkit eval knn` would.

    Args:
        recipe: Its ``[monitor]`` table says on what and how.
        transform: Evaluation preprocessing.
        device: Where the encoder computes.
        workers: Processes that decode, a process.
    """

    def __init__(self, recipe: Recipe, transform: Transform, device: torch.device, workers: int) -> None:
        monitor = recipe.monitor
        self.transform, self.device, self.workers = transform, device, workers
        data = monitor.source().model_copy(update={"background": recipe.data.background})
        pair = open_pair(data, data.split, seed=recipe.train.seed)
        self.pair = _limit_bank(pair, monitor.max_train, recipe.train.seed)
        self.protocol = KnnProtocol(min(monitor.k, len(self.pair.train)), monitor.temperature)
        self.batch_bytes = batch_bytes(transform, BATCH) if workers else 0
        self.left_out, self.scored, self.views = 0, len(self.pair.test), recipe.views
        self.seed = recipe.train.seed

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The protocol, as `sslkit eval knn` would write it down for the same score."""
        others = Readout().settings(), preprocessing_settings(preprocessing_of(self.views)), data_settings(self.pair)
        return self.protocol.settings(*others)

    def __call__(self, backbone: nn.Module, show: Callable[[Draw], None] | None = None) -> float | None:
        """Share of the monitor's test images classified right; None where features are not finite.

        ``show`` is told how to draw some of them beside their nearest neighbours, and must do so before it returns.

        Images that cannot be read are left out, of the bank and of the test, and counted in ``left_out``: a file that
        vanishes must not end a run. ``scored`` counts the test images that remain.

        Raises:
            UserError: Fewer than k images of the bank, or none of the test, can be read.
        """
        copy_buffers_from_first(backbone)
        bank, kept = self._features(backbone, self.pair.train)
        queries, asked = self._features(backbone, self.pair.test)
        self.left_out, self.scored = int((~kept).sum() + (~asked).sum()), int(asked.sum())
        if kept.sum() < self.protocol.k or not asked.any():
            raise UserError(f"[monitor] data: {self.left_out} images of {self.pair.description} cannot be read")
        if not (bank[kept].isfinite().all() and queries[asked].isfinite().all()):
            return None
        if show is not None:
            show(partial(neighbour_sheet, self.pair, bank, kept, queries, asked, self.seed))
        labels, truth = self.pair.train_labels[kept], self.pair.test_labels[asked]
        return knn_accuracy(bank[kept], labels, queries[asked], truth, self.protocol)

    def _features(self, backbone: nn.Module, source: ImageSource) -> tuple[Tensor, Tensor]:
        """Features (N, D) and which of them are of readable images, (N,) bool.

        Each process takes every world-size-th image; the last ones wrap around so that all have as many.
        """
        share = -(-len(source) // world_size())
        mine = (rank() + world_size() * np.arange(share)) % len(source)
        unreadable: list[int] = []
        features = extract_features(
            backbone,
            source.subset(mine),
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
    """How images are prepared to be judged, in timm's words."""
    size = (views.channels, views.size, views.size)
    crop: dict[str, Any] = {"input_size": size, "interpolation": views.interpolation}
    return crop | {"mean": views.mean, "std": views.std, "crop_pct": views.crop_pct}


def check_neighbours(monitor: KnnMonitor, k: int) -> None:
    """See that a run's monitor has a bank of as many images as neighbours are asked for.

    Earlier versions took fewer neighbours without a word; a run of theirs goes on with as many as it had.

    Raises:
        UserError: It has fewer; names the largest k that fits.
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


def layer_gradients(backbone: nn.Module) -> dict[str, float]:
    """Gradient norm of each layer in the order of the forward pass, as ``gradient/blocks.3``.

    A layer is a direct child of the backbone, or an element of a child that is a list. Parameters of no layer, such as
    a class token, come last.
    """
    squares: dict[str, Tensor] = {}
    for name, param in sorted(backbone.named_parameters(), key=lambda named: "." not in named[0]):
        if param.grad is not None:
            first, *rest = name.split(".")
            layer = f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first
            squares[layer] = squares.get(layer, param.new_zeros(())) + param.grad.float().square().sum()
    return {f"gradient/{layer}": float(square.sqrt()) for layer, square in squares.items()}
