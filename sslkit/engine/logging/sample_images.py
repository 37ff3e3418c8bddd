"""Images for a run's trackers: the views that it trains on, and the nearest neighbours of test images."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.augment.views_config import NUM_GLOBAL_VIEWS
from sslkit.data.decode.rgb import Pixels
from sslkit.data.loading.replacement import read_or_replace
from sslkit.data.sources.image_source import ImageSource
from sslkit.data.tools.image_grid import make_image_grid
from sslkit.evaluate.labelled_data import LabelledPair
from sslkit.recipe.resolve import Recipe

DrawImage = Callable[[], NDArray[np.uint8]]  # returns (H, W, 3)
ROWS, EPOCHS, NEIGHBOURS, SIDE = 8, 3, 6, 96


@dataclass(frozen=True)
class ExampleViews:
    """An image, and for each of the first three epochs its views, global views first."""

    image: Pixels
    epochs: list[list[Pixels]]


def example_views(recipe: Recipe, source: ImageSource, num_views: int = NUM_GLOBAL_VIEWS) -> Iterator[ExampleViews]:
    """Eight images spread over the data, with the same views that the run trains on."""
    pipeline = ViewPipeline(recipe.views, recipe.train.seed)
    for sample in np.linspace(0, len(source) - 1, min(ROWS, len(source)), dtype=int).tolist():
        image = read_or_replace(source, recipe.train.seed, epoch=0, sample=sample).pixels
        views = [
            [pipeline.make_view(image, epoch, sample, view) for view in range(num_views)] for epoch in range(EPOCHS)
        ]
        yield ExampleViews(image, views)


def views_image(recipe: Recipe, source: ImageSource) -> NDArray[np.uint8]:
    """The example views as a grid, (H, W, 3): one image per row, followed by the two views of each epoch."""
    tiles = []
    for example in example_views(recipe, source):
        tiles += [example.image, *itertools.chain(*example.epochs)]
    return np.asarray(make_image_grid(tiles, min(recipe.views.size, SIDE), 1 + EPOCHS * NUM_GLOBAL_VIEWS))


def neighbours_image(pair: LabelledPair, nearest_rows: Tensor, asked: Tensor, seed: int) -> NDArray[np.uint8]:
    """Random test images, one per row, each followed by the images of the bank nearest to it, (H, W, 3).

    ``nearest_rows`` (Q, K) are these images for all test images, nearest first; ``asked`` (Q,) bool says which of the
    test images can be read.
    """
    query_rows = asked.nonzero()[:, 0]
    chosen = query_rows[np.random.default_rng(seed).permutation(len(query_rows))[:ROWS]]
    found = nearest_rows[chosen, :NEIGHBOURS]
    tiles = []
    for query, rows in zip(chosen.tolist(), found.tolist(), strict=True):
        tiles += [pair.test.read(query), *(pair.train.read(row) for row in rows)]
    return np.asarray(make_image_grid(tiles, SIDE, 1 + found.shape[1]))
