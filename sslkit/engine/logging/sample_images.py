"""Pictures that a run shows its trackers: the views it learns from, and which images its encoder holds for alike."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.augment.policies import LARGE_VIEWS
from sslkit.data.loading.replacement import read_or_replace
from sslkit.data.sources.image_source import ImageSource
from sslkit.data.tools.image_grid import make_image_grid
from sslkit.evaluate.labelled_data import LabelledPair
from sslkit.evaluate.probes.knn import nearest
from sslkit.recipe.resolve import Recipe

Draw = Callable[[], NDArray[np.uint8]]  # a picture, (H, W, 3)
ROWS, DRAWS, NEIGHBOURS, SIDE = 8, 3, 6, 96


def view_sheet(recipe: Recipe, source: ImageSource) -> NDArray[np.uint8]:
    """Images spread over the data, a row each: as it is, then its two views of the first three epochs, (H, W, 3)."""
    pipeline = ViewPipeline(recipe.views, recipe.train.seed)
    tiles = []
    for sample in np.linspace(0, len(source) - 1, min(ROWS, len(source)), dtype=int).tolist():
        image = read_or_replace(source, recipe.train.seed, epoch=0, sample=sample).pixels
        tiles += [image]
        tiles += [pipeline.cut(image, epoch, sample, view) for epoch in range(DRAWS) for view in range(LARGE_VIEWS)]
    return np.asarray(make_image_grid(tiles, min(recipe.views.size, SIDE), 1 + DRAWS * LARGE_VIEWS))


def neighbour_sheet(
    pair: LabelledPair, bank: Tensor, kept: Tensor, queries: Tensor, asked: Tensor, seed: int
) -> NDArray[np.uint8]:
    """Test images drawn by lot, a row each, with the images of the bank nearest to them after it, (H, W, 3).

    Args:
        pair: Images of bank and test.
        bank: (N, D) features.
        kept: (N,) bool, which of them are of images that can be read.
        queries: (Q, D) features.
        asked: (Q,) bool, likewise.
        seed: Of the draw, which is the same each time.
    """
    bank_rows, query_rows = kept.nonzero()[:, 0], asked.nonzero()[:, 0]
    chosen = query_rows[np.random.default_rng(seed).permutation(len(query_rows))[:ROWS]]
    found = nearest(queries[chosen], bank[bank_rows], min(NEIGHBOURS, len(bank_rows)), _unit)[1]
    tiles = []
    for query, rows in zip(chosen.tolist(), bank_rows[found].tolist(), strict=True):
        tiles += [pair.test.read(query), *(pair.train.read(row) for row in rows)]
    return np.asarray(make_image_grid(tiles, SIDE, 1 + found.shape[1]))


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)
