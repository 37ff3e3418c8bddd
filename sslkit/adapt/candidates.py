"""What an encoder can be used as: a point of the run, an input size, features as they are or whitened.

The best of several candidates looks better than it is on the images that chose it, and on those that chose it by it.
So each part of the images is judged with the candidate that the other parts chose among themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslkit.adapt.judged_images import JudgedImages
from sslkit.evaluate.features.encoder import Encoder
from sslkit.evaluate.features.readouts import Readout, extract_readouts
from sslkit.evaluate.features.whitening import whiten
from sslkit.evaluate.verdict import Difference, paired_difference


@dataclass(frozen=True)
class Candidate:
    """One use of an encoder, and which images it classifies correctly by kNN.

    Attributes:
        name: For tables.
        epoch: Point of the run; 0 is the start.
        size: Side of the input in pixels.
        whitened: Whether its features are whitened.
        correct: (N,) of the judged images, each part classified by the others, or by the training images.
        choosing: (P,) accuracy on the images that choose for each part: those that classify it, by each other.
        merit: Accuracy on all images that may choose: ``correct``'s mean; with a test split, on the training images.
        features: Of the judged sources, as they are.
    """

    name: str
    epoch: int
    size: int
    whitened: bool
    correct: NDArray[np.bool_]
    choosing: NDArray[np.float64]
    merit: float
    features: list[Tensor]

    @property
    def accuracy(self) -> float:
        """Share of the judged images that are classified correctly."""
        return float(self.correct.mean())


def candidates_of(encoder: Encoder, epoch: int, judged: JudgedImages, readout: Readout) -> list[Candidate]:
    """An encoder at its input size, with features as they are and whitened."""
    size = int(encoder.preprocessing["input_size"][1])
    features = [
        extract_readouts(encoder, source.without_labels(), encoder.transform(), [readout])[0].clone()
        for source in judged.sources
    ]
    name = f"{f'epoch {epoch}' if epoch else 'untouched'}, {size} px"
    found = []
    for whitened in (False, True):
        correct, choosing = judged.knn(whiten(*features) if whitened else features)
        merit = float(correct.mean() if judged.test is None else choosing[0])
        label = f"{name}, whitened" if whitened else name
        found.append(Candidate(label, epoch, size, whitened, correct, choosing, merit, features))
    return found


def best(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the highest merit; the first of equals."""
    return max(candidates, key=lambda candidate: candidate.merit)


def chosen_by_parts(candidates: Sequence[Candidate], judged: JudgedImages) -> list[Candidate]:
    """The candidate to judge each part with: the best by the images that classify it."""
    parts = range(len(judged.parts))
    return [max(candidates, key=lambda candidate: candidate.choosing[part]) for part in parts]


def fairly_judged(candidates: Sequence[Candidate], judged: JudgedImages) -> NDArray[np.bool_]:
    """Which images are classified correctly, each with the candidate that other images chose: (N,)."""
    correct = np.zeros(judged.count, dtype=np.bool_)
    for (_, tested), chosen in zip(judged.parts, chosen_by_parts(candidates, judged), strict=True):
        correct[tested.numpy()] = chosen.correct[tested.numpy()]
    return correct


@dataclass(frozen=True)
class Comparison:
    """End against start on one labelled set.

    Attributes:
        measure: Such as ``kNN``.
        start: Accuracy of the start in [0, 1].
        end: Accuracy of the end.
        difference: End minus start, paired over the images.
    """

    measure: str
    start: float
    end: float
    difference: Difference

    def __str__(self) -> str:
        """Such as ``kNN: 57.8 % -> 62.1 %, better by 4.3 points (2.9 to 5.6)``."""
        return f"{self.measure}: {self.start:.1%} -> {self.end:.1%}, {self.difference}"


def compare(measure: str, start: NDArray[np.bool_], end: NDArray[np.bool_]) -> Comparison:
    """Compare two encoders image by image."""
    return Comparison(measure, float(start.mean()), float(end.mean()), paired_difference(end, start))


def compare_encoders(judged: JudgedImages, starts: Sequence[Candidate], ends: Sequence[Candidate]) -> list[Comparison]:
    """Compare the best end with the best start by kNN and by a linear probe; see `fairly_judged`."""
    knn = compare("kNN", fairly_judged(starts, judged), fairly_judged(ends, judged))
    with torch.random.fork_rng(devices=[]):
        probes = [
            judged.linear_correct([chosen.features for chosen in chosen_by_parts(each, judged)])
            for each in (starts, ends)
        ]
    return [knn, compare("linear probe", *probes)]
