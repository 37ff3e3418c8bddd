"""How the encoder of a run stands: the kNN of random weights, pixels and the start on the images of the monitor."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from sslkit.distributed.collectives import world_size
from sslkit.distributed.consistency import all_or_none
from sslkit.engine.monitor.knn_monitor import KnnMonitor, preprocessing_of
from sslkit.errors import UserError
from sslkit.evaluate.evaluation_result import RANDOM_DRAWS, Score, score_of, score_of_draws
from sslkit.evaluate.features.encoder import RANDOM_INIT, Encoder
from sslkit.evaluate.features.pixel_baselines import (
    CHUNK,
    COLOUR_HISTOGRAMS,
    RAW_PIXELS,
    PixelTransform,
    are_coloured,
    colour_histograms,
    raw_pixel_side,
)
from sslkit.evaluate.features.transforms import Transform
from sslkit.evaluate.probes.sharded_bank import Shard, in_order
from sslkit.hub.untrusted import parse_encoder_config
from sslkit.publish.encoder_folder import create_start, encoder_config
from sslkit.recipe.resolve import Recipe

MAX_IMAGES = 100_000  # of bank and test; the pixels of more fill the memory of small machines


def score_baselines(knn: KnnMonitor, backbone: nn.Module, recipe: Recipe) -> list[Score]:
    """Scores of the ``backbone`` that ``knn`` has just measured, and of its baselines; all processes call it.

    The baselines are those of `sslkit eval knn`. Raises `UserError` if there are too many images, or weights or images
    cannot be read.
    """
    images = len(knn.pair.train) + len(knn.pair.test)
    if images > MAX_IMAGES:
        raise UserError(
            f"{images} images are more than {MAX_IMAGES}; set [monitor] max_train, or use `sslkit eval knn`"
        )
    own = knn.correct
    scores = [score_of("this run", own)]
    draws = [knn.classify(*_features(knn, module)) for module in _random_twins(backbone, recipe)]
    scores.append(score_of_draws(RANDOM_INIT, draws, own))
    start = all_or_none(lambda: create_start(recipe))
    if start is not None:
        scores.append(score_of(start[0], knn.classify(*_features(knn, start[1])), own))
    if recipe.views.channels == 3:
        readable = knn.kept.nonzero()[:, 0].numpy()
        transform = PixelTransform(raw_pixel_side(knn.pair.train.subset(readable)))
        bank, queries = _features(knn, nn.Identity(), transform)
        scores.append(score_of(RAW_PIXELS, knn.classify(bank, queries, centre=True), own))  # as by `sslkit eval knn`
        first = bank.features[: -(-CHUNK // world_size())]
        if are_coloured(in_order(first.to(knn.device), min(CHUNK, len(bank.readable)))):
            histograms = (replace(each, features=colour_histograms(each.features)) for each in (bank, queries))
            scores.append(score_of(COLOUR_HISTOGRAMS, knn.classify(*histograms, centre=True), own))
    return scores


def _features(knn: KnnMonitor, module: nn.Module, transform: Transform | None = None) -> tuple[Shard, Shard]:
    """Features of the bank and of the test images."""
    bank, queries = (knn.features(module, source, transform) for source in (knn.pair.train, knn.pair.test))
    if bool((knn.kept & ~bank.readable).any() or (knn.asked & ~queries.readable).any()):
        raise UserError("images that the encoder was measured on cannot be read any more")
    return bank, queries


def _random_twins(backbone: nn.Module, recipe: Recipe) -> Iterator[nn.Module]:
    """The same architecture with random weights, as in `sslkit eval`."""
    with torch.random.fork_rng(devices=[]):
        config = parse_encoder_config(encoder_config(recipe, "other"), "recipe.toml")
    architecture = config.architecture, config.model_args, config.small_stem
    encoder = Encoder(backbone, preprocessing_of(recipe.views), "", *architecture)
    return (encoder.random_twin(seed).module for seed in range(RANDOM_DRAWS))
