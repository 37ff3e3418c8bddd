"""The images of neighbours, map and attention: a random subset of a run's labelled data, and its features."""

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
class GalleryImages:
    """At most 500 query images, a bank of at most 1500 others to find their neighbours in, and the names of classes.

    Labels are None if the data has none.
    """

    bank: ImageSource
    queries: ImageSource
    bank_labels: list[str] | None
    query_labels: list[str] | None
    description: str


def choose_images(recipe: Recipe, data: str = "", split: str = "train") -> GalleryImages:
    """Choose random images, with a fixed seed: of ``data``, or the monitor's labelled data, or the training data.

    Data without labels, or with one class only, gives images without labels. Raises `UserError` if the data cannot be
    read or has fewer than three images.
    """
    read_as = {"channels": recipe.data.channels, "background": recipe.data.background}
    if data:
        config = DataConfig.model_validate({"path": data, "split": split, **read_as})
    elif recipe.monitor.data:
        config = recipe.monitor.source().model_copy(update=read_as)
    else:
        config = recipe.data
    source = open_source(config)
    if pair := _labelled(config, source):
        bank, bank_rows = _readable_sample(pair.train, MAX_BANK)
        queries, query_rows = _readable_sample(pair.test, MAX_QUERIES)
        bank_labels = [pair.classes[label] for label in pair.train_labels[torch.from_numpy(bank_rows)].tolist()]
        query_labels = [pair.classes[label] for label in pair.test_labels[torch.from_numpy(query_rows)].tolist()]
        return GalleryImages(bank, queries, bank_labels, query_labels, pair.description)
    if len(source) < 3:
        raise UserError(f"{source.description}: neighbours need at least 3 images, found {len(source)}")
    drawn, unlabelled = source.sample(MAX_BANK + MAX_QUERIES, SEED), source.without_labels()
    is_query = np.arange(len(drawn)) % 4 == 0
    bank, _ = _readable_sample(unlabelled.subset(np.sort(drawn[~is_query])), MAX_BANK)
    queries, _ = _readable_sample(unlabelled.subset(np.sort(drawn[is_query])), MAX_QUERIES)
    return GalleryImages(bank, queries, None, None, f"{source.description}, without labels")


def _labelled(config: DataConfig, source: ImageSource) -> LabelledPair | None:
    """Train and test images if every image has a label and there are several classes; else None."""
    if source.label_column is None or config.streaming:  # to split a stream at random, all of it would be read
        return None
    try:
        return open_pair(config, config.split) if len(set(source.labels())) > 1 else None
    except UserError:
        return None


def _readable_sample(source: ImageSource, max_images: int) -> tuple[ImageSource, NDArray[np.int64]]:
    """Random images in order, without those that cannot be read, and their rows; raises `UserError` if none is left."""

    def is_readable(row: int) -> bool:
        try:
            source.read(row)
        except UnreadableImage:
            return False
        return True

    rows = np.sort(np.random.default_rng(SEED).permutation(len(source))[:max_images])
    kept = rows[list(map(is_readable, rows.tolist()))]
    if not len(kept):
        raise UserError(f"{source.description}: no readable image; run sslkit data check to see why")
    return source.subset(kept), kept


def extract(encoder: Encoder, images: GalleryImages) -> tuple[Tensor, Tensor]:
    """Features of bank and queries, normalised to unit length, (N, D) and (Q, D)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = encoder.batch_size(256)
    bank, queries = (
        extract_features(encoder.module, source, encoder.transform(), device=device, batch_size=size).cpu()
        for source in (images.bank, images.queries)
    )
    return torch.nn.functional.normalize(bank, dim=1), torch.nn.functional.normalize(queries, dim=1)
