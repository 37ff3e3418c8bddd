"""A few images of a run's labelled data with their features: what the galleries look at."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.sources.image_source import DataConfig, ImageSource, open_source
from sslkit.errors import UserError
from sslkit.evaluate.features.encoder import Encoder
from sslkit.evaluate.features.extraction import extract_features
from sslkit.evaluate.labelled_data import LabelledPair, open_pair
from sslkit.recipe.resolve import Recipe

MAX_BANK, MAX_QUERIES = 1500, 500
SEED = 0


@dataclass(frozen=True)
class Sample:
    """Images to search in and images to search for.

    Attributes:
        bank: At most 1500 images.
        queries: At most 500 others.
        bank_labels: Class names, one an image, or None if the data has none.
        query_labels: Likewise.
        description: Which data.
    """

    bank: ImageSource
    queries: ImageSource
    bank_labels: list[str] | None
    query_labels: list[str] | None
    description: str


def draw_sample(recipe: Recipe, data: str = "") -> Sample:
    """Draw images of ``data``, else of the monitor's labelled set, else of what the run learned from.

    The draw is seeded. Without labels, or with one class only, the images are shown without right and wrong.

    Raises:
        UserError: The data cannot be read, or holds fewer than three images.
    """
    read_as = {"channels": recipe.data.channels, "background": recipe.data.background}
    if data:
        config = DataConfig.model_validate({"path": data, **read_as})
    elif recipe.monitor.data:
        config = recipe.monitor.source().model_copy(update=read_as)
    else:
        config = recipe.data
    source = open_source(config)
    if pair := _labelled(config, source):
        bank, bank_rows = _some(pair.train, MAX_BANK)
        queries, query_rows = _some(pair.test, MAX_QUERIES)
        names = [pair.classes[number] for number in pair.train_labels[torch.from_numpy(bank_rows)].tolist()]
        truth = [pair.classes[number] for number in pair.test_labels[torch.from_numpy(query_rows)].tolist()]
        return Sample(bank, queries, names, truth, pair.description)
    if len(source) < 3:
        raise UserError(f"{source.description}: a gallery of neighbours needs at least three images, not {len(source)}")
    drawn, unlabelled = source.draw(MAX_BANK + MAX_QUERIES, SEED), source.without_labels()
    asked = np.arange(len(drawn)) % 4 == 0
    bank, queries = (unlabelled.subset(_readable(unlabelled, np.sort(rows))) for rows in (drawn[~asked], drawn[asked]))
    if not (len(bank) and len(queries)):
        raise UserError(f"{source.description}: none of the images of a gallery can be read; see sslkit data check")
    return Sample(bank, queries, None, None, f"{source.description}, without labels")


def _labelled(config: DataConfig, source: ImageSource) -> LabelledPair | None:
    """Both sides, where every image has a label, of more than one class in all; a page of pictures does without."""
    if source.label_column is None or config.streaming:  # a split by lot is of a stream's every part
        return None
    try:
        return open_pair(config, config.split) if len(set(source.labels())) > 1 else None
    except UserError:
        return None


def _some(source: ImageSource, at_most: int) -> tuple[ImageSource, NDArray[np.int64]]:
    rows = _readable(source, np.sort(np.random.default_rng(SEED).permutation(len(source))[:at_most]))
    if not len(rows):
        raise UserError(f"{source.description}: none of the images of a gallery can be read; see sslkit data check")
    return source.subset(rows), rows


def _readable(source: ImageSource, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of ``rows`` whose images can be read: a page of pictures does without the others."""

    def can_be_read(row: int) -> bool:
        try:
            source.read(row)
        except UnreadableImage:
            return False
        return True

    return rows[[can_be_read(row) for row in rows.tolist()]]


def features_of(encoder: Encoder, sample: Sample) -> tuple[Tensor, Tensor]:
    """The encoder's features of bank and queries, unit rows (N, D) and (Q, D)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = encoder.batch_size(256)
    bank, queries = (
        extract_features(encoder.module, source, encoder.transform(), device=device, batch_size=size)
        for source in (sample.bank, sample.queries)
    )
    return torch.nn.functional.normalize(bank, dim=1), torch.nn.functional.normalize(queries, dim=1)
