"""A frozen encoder and any images in, the label-free numbers out, beside those of the same architecture untrained."""

from dataclasses import dataclass

import torch

from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.errors import UserError
from sslkit.evaluate.features.extraction import load_encoder
from sslkit.evaluate.features.readouts import Reading, read_features
from sslkit.evaluate.input_checks import check_seed
from sslkit.evaluate.label_free.collapse_metrics import LabelFree, label_free


@dataclass(frozen=True)
class Contestant:
    """An encoder and its numbers.

    Attributes:
        encoder: Its name.
        dim: Width of its features.
        numbers: What they tell.
        encoder_revision: Commit on the Hugging Face Hub that was looked at; empty for what does not come from there.
    """

    encoder: str
    dim: int
    numbers: LabelFree
    encoder_revision: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Label-free numbers of an encoder and of its random twin, in this order.

    Attributes:
        data: Which images.
        images: How many of them.
        views: Random crops and mirrors of each.
        contestants: The encoder, then the same architecture with random weights.
    """

    data: str
    images: int
    views: int
    contestants: list[Contestant]


def diagnose_encoder(
    model: str,
    data: DataConfig,
    reading: Reading | None = None,
    *,
    images: int = 1000,
    views: int = 8,
    seed: int = 0,
) -> Diagnosis:
    """Compute the numbers of `collapse_metrics` on views of images, whose labels are not looked at.

    Views are the crops (area 0.08 to 1) and mirrors of the papers' linear protocols, the same for every encoder.

    Args:
        model: As `load_encoder` takes it.
        data: Any images.
        reading: Which layer, how many workers; its centre crop is not used.
        images: At most so many, the first of a seeded order (LiDAR's paper: 1000).
        views: Of each image, 2 or more (LiDAR's paper: 50).
        seed: Of order and views.

    Raises:
        UserError: Fewer than two images or views, or features that are not finite.
    """
    reading = reading or Reading()
    check_seed(seed, "diagnose, --seed")
    source = open_source(data).without_labels()
    count = min(images, len(source))
    if count < 2:
        raise UserError(
            f"--images: {count} of {source.description}; diagnosing compares images, so it needs two or more"
        )
    if views < 2:
        raise UserError(f"--views: {views}; diagnosing compares views of an image, so it needs two or more")
    source = source.subset(source.sample(count, seed))
    encoder = load_encoder(model)
    contestants = []
    for each in (encoder, encoder.random_twin(seed)):
        transform = each.training_transform()
        features = [read_features(each, source, transform, [reading], seed * views + view)[0] for view in range(views)]
        stacked = torch.stack(features, dim=1)
        contestants.append(Contestant(each.description, stacked.shape[2], label_free(stacked), each.revision))
    return Diagnosis(source.description, count, views, contestants)
