"""Label-free metrics of a frozen encoder, compared with those of the same architecture with random weights."""

from dataclasses import dataclass

import torch

from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.errors import UserError
from sslkit.evaluate.features.compared_encoders import in_turn
from sslkit.evaluate.features.encoder import load_encoder
from sslkit.evaluate.features.readouts import Readout, extract_readouts
from sslkit.evaluate.input_checks import check_seed
from sslkit.evaluate.label_free.collapse_metrics import LabelFreeMetrics, label_free_metrics


@dataclass(frozen=True)
class EncoderDiagnosis:
    """The metrics of one encoder.

    Attributes:
        encoder: Name of the encoder.
        dim: Number of feature dimensions.
        numbers: Its metrics.
        encoder_revision: Commit on the Hugging Face Hub; empty for encoders from elsewhere.
    """

    encoder: str
    dim: int
    numbers: LabelFreeMetrics
    encoder_revision: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Metrics of an encoder and of its random twin.

    Attributes:
        data: Description of the images.
        images: Number of images.
        views: Number of random crops of each image.
        encoders: The encoder, then the same architecture with random weights.
    """

    data: str
    images: int
    views: int
    encoders: list[EncoderDiagnosis]

    @property
    def verdict(self) -> str:
        """One sentence: effective directions against those of random weights, for an encoder that has not collapsed."""
        own, random = (each.numbers.effective_rank for each in self.encoders)
        more = "more" if own > random else "fewer"
        return (
            f"Not collapsed: {own:.3g} effective directions, {more} than random init ({random:.3g}). That does not say "
            "whether the encoder is better; labelled images do: sslkit eval knn MODEL --data DIR"
        )


def diagnose_encoder(
    model: str, data: DataConfig, readout: Readout | None = None, *, images: int = 1000, views: int = 8, seed: int = 0
) -> Diagnosis:
    """Compute the metrics of `collapse_metrics` on random views of images. Labels are not read.

    The views are the random crops (area 0.08 to 1) and flips of the papers' linear protocols, the same for all
    encoders. At most ``images`` are drawn by the seed, with at least 2 ``views`` of each (LiDAR's paper: 1000 and 50).
    The crop of ``readout`` is not used. Raises `UserError` if there are fewer than two images or views, or features are
    not finite.
    """
    readout = readout or Readout()
    check_seed(seed, "diagnose, --seed")
    source = open_source(data).without_labels()
    count = min(images, len(source))
    if count < 2:
        raise UserError(f"--images: needs at least 2 images to compare, but takes {count} of {source.description}")
    if views < 2:
        raise UserError(f"--views: needs at least 2 views of each image to compare, not {views}")
    source = source.subset(source.sample(count, seed))
    encoder = load_encoder(model)
    diagnoses = []
    for each in in_turn([encoder, encoder.random_twin(seed)]):
        transform = each.training_transform()
        seeds = range(seed * views, (seed + 1) * views)
        features = [extract_readouts(each, source, transform, [readout], view_seed)[0] for view_seed in seeds]
        stacked = torch.stack(features, dim=1)
        metrics = label_free_metrics(stacked)
        diagnoses.append(EncoderDiagnosis(each.description, stacked.shape[2], metrics, each.revision))
    return Diagnosis(source.description, count, views, diagnoses)
