"""Start and end compared without labels. None of these measures is an accuracy; see `CAVEAT`."""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from sslkit.data.decode.rgb import UnreadableImage
from sslkit.data.sources.image_source import ImageSource
from sslkit.evaluate.features.encoder import Encoder
from sslkit.evaluate.features.readouts import Readout, extract_readouts
from sslkit.evaluate.label_free.cluster_metrics import cluster_learnability, intrinsic_dimension
from sslkit.evaluate.label_free.collapse_metrics import alpha_req, effective_rank, lidar

IMAGES, VIEWS = 400, 6
NOISE = 0.1  # correlation of neighbouring pixels below which an image shows nothing
CHOOSING = "LiDAR"
CAVEAT = (
    "These measures order encoders only roughly as accuracy does, and training on views raises some of them by itself, "
    "even on noise: they can warn of a collapse, but cannot prove a gain. A hundred labelled images (--labelled) can."
)


@dataclass(frozen=True)
class LabelFreeComparison:
    """One measure of start and end on the same views of the same images; None if there are too few images."""

    measure: str
    start: float | None
    end: float | None
    meaning: str

    def __str__(self) -> str:
        """Such as ``LiDAR: 41.2 -> 45.0 (directions that separate images but not views)``."""
        numbers = ["-" if value is None else f"{value:.4g}" for value in (self.start, self.end)]
        return f"{self.measure}: {' -> '.join(numbers)} ({self.meaning})"


MEANINGS = {
    "RankMe": "directions that features use; more is usually better",
    "LiDAR": "directions that separate images but not their views; more is usually better",
    "alpha-ReQ": "decay of the spectrum; best near 1",
    "cluster learnability": "how well neighbours predict k-means clusters, as CLID; more is usually better",
    "intrinsic dimension": "by two neighbours, as CLID; more is usually better",
}


def label_free_measures(encoder: Encoder, source: ImageSource, seed: int = 0) -> dict[str, float | None]:
    """The measures of `MEANINGS` on random views of a sample of images. Labels are not read."""
    chosen = readable(source.without_labels().subset(source.sample(min(IMAGES, len(source)), seed)))
    plain = extract_readouts(encoder, chosen, encoder.transform(), [Readout()])[0]
    views = [
        extract_readouts(encoder, chosen, encoder.training_transform(), [Readout()], seed * VIEWS + view)[0]
        for view in range(VIEWS)
    ]
    return {
        "RankMe": effective_rank(plain),
        "LiDAR": lidar(torch.stack(views, dim=1)),
        "alpha-ReQ": alpha_req(plain),
        "cluster learnability": cluster_learnability(plain, seed),
        "intrinsic dimension": intrinsic_dimension(plain),
    }


def readable(source: ImageSource) -> ImageSource:
    """The images of a source that can be read."""
    kept = []
    for index in range(len(source)):
        with suppress(UnreadableImage):
            source.read(index)
            kept.append(index)
    return source.subset(np.array(kept, dtype=np.int64))


def compare_measures(start: dict[str, float | None], end: dict[str, float | None]) -> list[LabelFreeComparison]:
    """Start and end side by side."""
    return [LabelFreeComparison(name, start[name], end[name], meaning) for name, meaning in MEANINGS.items()]


def seems_gained(comparisons: list[LabelFreeComparison]) -> bool:
    """Whether LiDAR, RankMe and cluster learnability have all risen: the weakest sign on which an encoder is kept."""
    risen = {each.measure: (each.end or 0.0) > (each.start or 0.0) for each in comparisons}
    return all(risen[name] for name in ("RankMe", "LiDAR", "cluster learnability"))


def neighbour_correlation(source: ImageSource, sample: int = 32) -> float:
    """Median correlation of pixels with their right neighbours over a sample of images; about 0 for noise."""
    found = []
    for index in np.linspace(0, len(source) - 1, min(sample, len(source)), dtype=int):
        try:
            grey = source.read(int(index)).astype(np.float64).mean(axis=2)
        except UnreadableImage:
            continue
        left, right = grey[:, :-1].ravel(), grey[:, 1:].ravel()
        if left.size > 1 and left.std() > 0.0 and right.std() > 0.0:
            found.append(float(np.corrcoef(left, right)[0, 1]))
    return float(np.median(found)) if found else 1.0
