"""An encoder and labelled images in, a score beside its baselines out.

Baselines are always there: the raw pixels, the same architecture with random weights, and any timm name asked for.
A pretraining that does not beat them has learned nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sslkit.data.source import DataConfig, ImageSource
from sslkit.errors import UserError
from sslkit.evaluate.features import (
    Encoder,
    Transform,
    extract_features,
    load_encoder,
    raw_pixel_side,
    raw_pixels,
    read_layer,
)
from sslkit.evaluate.finetune import FinetuneProtocol, Say, classify, finetune
from sslkit.evaluate.knn import KnnProtocol, knn_accuracy
from sslkit.evaluate.labels import LabelledPair, open_pair
from sslkit.evaluate.linear import LinearProtocol, linear_accuracy
from sslkit.evaluate.subsets import choose_subset
from sslkit.parts.backbone import family

RAW_PIXELS = "raw pixels"


@dataclass(frozen=True)
class Reading:
    """How features are read off an encoder.

    Attributes:
        layer: Mean over positions of this block's output (timm's index); None is the model's own pooled output.
        crop_pct: Share of the shorter side that the centre crop keeps; 0 is the model's own.
        workers: Processes that decode images.
        batch_size: Images at a time.
    """

    layer: int | None = None
    crop_pct: float = 0.0
    workers: int = 0
    batch_size: int = 256


@dataclass(frozen=True)
class Score:
    """Accuracy of one encoder, in [0, 1], and what was chosen on the way."""

    encoder: str
    accuracy: float
    note: str = ""


@dataclass(frozen=True)
class Judgement:
    """Scores of an encoder and its baselines under one protocol; the encoder's own is the first.

    Attributes:
        evaluation: Name of the protocol.
        data: Which images.
        protocol: Every setting the scores depend on.
        scores: The encoder's, then the baselines'.
    """

    evaluation: str
    data: str
    protocol: dict[str, Any]
    scores: list[Score]


def evaluate_knn(
    model: str,
    data: DataConfig,
    protocol: KnnProtocol | None = None,
    reading: Reading | None = None,
    *,
    baselines: Sequence[str] = (),
    train_split: str = "train",
    test_split: str = "",
) -> Judgement:
    """Weighted k-nearest neighbours on frozen features.

    Args:
        model: As `load_encoder` takes it.
        data: Labelled images.
        protocol: Defaults to cosine, k = 20, temperature 0.07.
        reading: Which layer, which crop.
        baselines: timm names to score too.
        train_split: The bank.
        test_split: The queries; see `open_pair`.
    """
    protocol, reading = protocol or KnnProtocol(), reading or Reading()
    pair = open_pair(data, train_split, test_split)
    scores = []
    for encoder in _contestants(model, baselines, reading):
        # The brightness that all pictures share drowns their differences: raw pixels are always centred.
        used = protocol if encoder else replace(protocol, centre=True)
        bank, queries = (_features(encoder, source, pair, reading) for source in (pair.train, pair.test))
        accuracy = knn_accuracy(bank, pair.train_labels, queries, pair.test_labels, used)
        scores.append(Score(encoder.description if encoder else RAW_PIXELS, accuracy))
    settings = {**vars(protocol), **_settings(reading), "train_split": train_split, "test_split": test_split}
    name = f"knn k={protocol.k} temperature={protocol.temperature:g}" + (" centred" if protocol.centre else "")
    return Judgement(name, pair.description, settings, scores)


def evaluate_linear(
    model: str,
    data: DataConfig,
    protocol: str = "logistic",
    reading: Reading | None = None,
    *,
    augment: bool = True,
    epochs: int = 0,
    baselines: Sequence[str] = (),
    train_split: str = "train",
    test_split: str = "",
) -> Judgement:
    """A linear classifier on frozen features.

    Args:
        model: As `load_encoder` takes it.
        data: Labelled images.
        protocol: ``logistic``, ``moco_v1`` (also v2's) or ``moco_v3``; see `LinearProtocol`.
        reading: Which layer, which crop.
        augment: Whether the SGD protocols see random crops and mirrors, as in the papers; else the features of the
            centre crop, computed once. ``logistic`` always uses those.
        epochs: Of the SGD protocols; 0 takes the paper's.
        baselines: timm names to score too.
        train_split: What the classifier learns from.
        test_split: What it is scored on; see `open_pair`.
    """
    reading = reading or Reading()
    pair = open_pair(data, train_split, test_split)
    scores = []
    settings: dict[str, Any] = {}
    for encoder in _contestants(model, baselines, reading):
        used = LinearProtocol.named(protocol, is_vit=encoder is not None and family(encoder.architecture) == "vit")
        used = replace(used, epochs=epochs or used.epochs)
        online = augment and encoder is not None and used.name != "logistic"
        train = _epochs_of(encoder, pair, reading) if online else _features(encoder, pair.train, pair, reading)
        test = _features(encoder, pair.test, pair, reading)
        score = linear_accuracy(train, pair.train_labels, test, pair.test_labels, used)
        scores.append(Score(encoder.description if encoder else RAW_PIXELS, score.accuracy, score.chosen))
        settings = settings or {**vars(used), "augment": online}
    settings |= {**_settings(reading), "train_split": train_split, "test_split": test_split}
    return Judgement(f"linear {protocol}", pair.description, settings, scores)


def evaluate_finetune(
    model: str,
    data: DataConfig,
    protocol: FinetuneProtocol,
    *,
    labels: str = "all",
    neck: nn.Module | None = None,
    scratch: bool = True,
    baselines: Sequence[str] = (),
    train_split: str = "train",
    test_split: str = "",
    workers: int = 0,
    say: Say = lambda _sentence: None,
) -> Judgement:
    """Fine-tune the encoder and score it, at the last epoch, beside the same training from random weights.

    Args:
        model: As `load_encoder` takes it.
        data: Labelled images.
        protocol: How; see `FinetuneProtocol.named`.
        labels: How many of the labels; see `choose_subset`.
        neck: First layers of the model's projector, to be fine-tuned with it.
        scratch: Whether the architecture is also trained from random weights, without ``neck``.
        baselines: timm names to fine-tune too.
        train_split: What is learned from.
        test_split: What is scored on; see `open_pair`.
        workers: Processes that decode and augment.
        say: Told of every epoch.
    """
    pair = open_pair(data, train_split, test_split)
    chosen = choose_subset(pair.train, pair.train_labels.numpy(), labels, protocol.seed)
    source, known = pair.train.subset(chosen), pair.train_labels[torch.from_numpy(chosen)]
    encoder = load_encoder(model)
    contestants = [(encoder, neck)]
    contestants += [(encoder.random_twin(protocol.seed), None)] if scratch else []
    contestants += [(load_encoder(name), None) for name in baselines]
    scores = []
    for contestant, its_neck in contestants:
        name = "from scratch" if contestant.description == "random init" else contestant.description
        say(name)
        options: dict[str, Any] = {"neck": its_neck, "workers": workers, "say": say}
        classifier = finetune(contestant, source, known, len(pair.classes), protocol, **options)
        right = classify(classifier, contestant, pair.test, workers) == pair.test_labels
        scores.append(Score(name, float(right.float().mean())))
    settings = {**vars(protocol), "labels": labels, "neck": neck is not None}
    settings |= {"train_split": train_split, "test_split": test_split}
    named = f"finetune {protocol.name}, {protocol.epochs} epochs, {labels} of the labels ({len(chosen)})"
    return Judgement(named, pair.description, settings, scores)


def _contestants(model: str, baselines: Sequence[str], reading: Reading) -> Iterator[Encoder | None]:
    """The encoder, its random twin, None for raw pixels, and the baselines."""
    encoder = _with_crop(load_encoder(model), reading)
    others = [_with_crop(load_encoder(name), reading) for name in baselines]
    yield encoder
    yield encoder.random_twin()
    yield None
    yield from others


def _with_crop(encoder: Encoder, reading: Reading) -> Encoder:
    if not reading.crop_pct:
        return encoder
    if not 0.1 <= reading.crop_pct <= 1.0:
        raise UserError(f"--crop-pct: must lie between 0.1 and 1, not {reading.crop_pct:g}")
    return replace(encoder, preprocessing={**encoder.preprocessing, "crop_pct": reading.crop_pct})


def _features(encoder: Encoder | None, source: ImageSource, pair: LabelledPair, reading: Reading) -> Tensor:
    if encoder is None:
        return raw_pixels(source, raw_pixel_side(pair.train))
    return read_features(encoder, source, encoder.transform(), reading, seed=None)


def _epochs_of(encoder: Encoder | None, pair: LabelledPair, reading: Reading) -> Any:
    assert encoder is not None
    return lambda epoch: read_features(encoder, pair.train, encoder.training_transform(), reading, seed=epoch + 1)


def read_features(
    encoder: Encoder, source: ImageSource, transform: Transform, reading: Reading, seed: int | None
) -> Tensor:
    """Features of every image, as asked for, on a GPU if there is one; see `extract_features`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = encoder.module if reading.layer is None else read_layer(encoder, reading.layer)
    return extract_features(
        module,
        source,
        transform,
        device=device,
        batch_size=reading.batch_size,
        workers=reading.workers,
        seed=seed,
    )


def _settings(reading: Reading) -> dict[str, Any]:
    return {"layer": reading.layer, "crop_pct": reading.crop_pct}
