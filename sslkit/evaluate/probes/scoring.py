"""An encoder and labelled images in, a score beside its baselines out.

Baselines are always there: the raw pixels, the same architecture with random weights, and any timm name asked for.
A pretraining that does not beat them has learned nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sslkit.data.loading.shared_memory import explain_death
from sslkit.data.sources.image_source import DataConfig, ImageSource
from sslkit.errors import UserError
from sslkit.evaluate.features.extraction import (
    Encoder,
    load_encoder,
    raw_pixel_side,
    raw_pixels,
)
from sslkit.evaluate.features.readouts import Reading, read_features
from sslkit.evaluate.label_subsets import choose_subset
from sslkit.evaluate.labelled_data import LabelledPair, open_pair
from sslkit.evaluate.probes.finetune import FinetuneProtocol, Say, classify, finetune
from sslkit.evaluate.probes.knn import KnnProtocol, check_neighbours, predict_all
from sslkit.evaluate.probes.linear import HELD_OUT_CHOOSES, EpochFeatures, LinearProtocol, linear_accuracy
from sslkit.evaluate.probes.sweep import SweepProtocol, sweep
from sslkit.evaluate.protocol import (
    bootstrap_interval,
    data_settings,
    digest_of,
    knn_settings,
    preprocessing_settings,
    protocol_hash,
)
from sslkit.parts.backbone import family

RAW_PIXELS = "raw pixels"


@dataclass(frozen=True)
class Score:
    """How one encoder did.

    Attributes:
        encoder: Which.
        accuracy: In [0, 1]; of what, `Judgement.measure` says.
        interval: Bootstrap 95 % interval of the accuracy, where there is one.
        note: What was chosen on the way.
        measures: All numbers by name, where there is more than one, each in [0, 1].
        intervals: Of each of these, its bootstrap 95 % interval.
        encoder_revision: Commit on the Hugging Face Hub that was scored; empty for what does not come from there.
    """

    encoder: str
    accuracy: float
    interval: tuple[float, float] | None = None
    note: str = ""
    measures: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    encoder_revision: str = ""


@dataclass(frozen=True)
class Judgement:
    """Scores of an encoder and its baselines under one protocol; the encoder's own is the first.

    Attributes:
        evaluation: Name of the protocol.
        data: Which images.
        protocol: Every setting the scores depend on, the encoder aside.
        scores: The encoder's, then the baselines'.
        grid: Of a sweep: every setting tried on the encoder, best first on the held-out images.
        measure: What the scores' ``accuracy`` is.
    """

    evaluation: str
    data: str
    protocol: dict[str, Any]
    scores: list[Score]
    measure: str = "top-1 accuracy"
    grid: list[dict[str, Any]] = field(default_factory=list)

    @property
    def protocol_hash(self) -> str:
        """Equal for scores that may be compared; see `protocol_hash`."""
        return protocol_hash(self.protocol)


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
    """Weighted k-nearest neighbours on frozen features, by default cosine, k = 20, temperature 0.07.

    Arguments are those of `evaluate_knn_grid`.
    """
    protocols = [protocol or KnnProtocol()]
    options: dict[str, Any] = {"baselines": baselines, "train_split": train_split, "test_split": test_split}
    return evaluate_knn_grid(model, data, protocols, reading, **options)[0]


def evaluate_knn_grid(
    model: str,
    data: DataConfig,
    protocols: Sequence[KnnProtocol],
    reading: Reading | None = None,
    *,
    baselines: Sequence[str] = (),
    train_split: str = "train",
    test_split: str = "",
) -> list[Judgement]:
    """Several kNN protocols at the cost of one: features and neighbours are found once.

    Args:
        model: As `load_encoder` takes it.
        data: Labelled images.
        protocols: What to count.
        reading: Which layer, which crop.
        baselines: timm names to score too.
        train_split: The bank.
        test_split: The queries; see `open_pair`.
    """
    reading = reading or Reading()
    pair = open_pair(data, train_split, test_split)
    check_neighbours(protocols, len(pair.train))
    scores: list[list[Score]] = [[] for _ in protocols]
    crop: dict[str, Any] = {}
    for encoder in _contestants(model, baselines, reading):
        crop = crop or preprocessing_settings(encoder.preprocessing if encoder else {})
        # The brightness that all pictures share drowns their differences: raw pixels are always centred.
        used = [protocol if encoder else replace(protocol, centre=True) for protocol in protocols]
        bank, queries = (_features(encoder, source, pair, reading) for source in (pair.train, pair.test))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        predicted = predict_all(queries.to(device), bank, pair.train_labels, len(pair.classes), used)
        for found, classes in zip(scores, predicted, strict=True):
            accuracy = float((classes.cpu() == pair.test_labels).float().mean())
            found.append(_score(encoder, accuracy, pair))
    judgements, images = [], data_settings(pair)
    for protocol, found in zip(protocols, scores, strict=True):
        settings = knn_settings(protocol, reading.settings(), crop, images)
        judgements.append(Judgement(f"{protocol}{_of(reading)}", pair.description, settings, found))
    return judgements


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
        protocol: ``logistic``, or a paper's by name; see `LinearProtocol`.
        reading: Which layer, which crop.
        augment: Whether the SGD protocols see random crops and mirrors, as in the papers; else the features of the
            centre crop, computed once. ``logistic`` always uses those.
        epochs: Of the SGD protocols; 0 takes the paper's.
        baselines: timm names to score too.
        train_split: What the classifier learns from.
        test_split: What it is scored on; see `open_pair`.
    """
    if epochs and protocol == "logistic":
        raise UserError(
            "--epochs: logistic has none, it is solved to convergence; leave it out, or take another protocol"
        )
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
        scores.append(_score(encoder, score.accuracy, pair, score.chosen))
        if encoder and not settings:
            settings = {"kind": "linear", **used.settings(), "augment": online, "selection": used.selection}
            settings |= preprocessing_settings(encoder.preprocessing)
    settings |= {**reading.settings(), **data_settings(pair)}
    return Judgement(f"linear {protocol}{_of(reading)}", pair.description, settings, scores)


def evaluate_sweep(
    model: str,
    data: DataConfig,
    protocol: SweepProtocol | None = None,
    readings: Sequence[Reading] = (),
    *,
    baselines: Sequence[str] = (),
    train_split: str = "train",
    test_split: str = "",
) -> Judgement:
    """Many linear heads at once on frozen features; each encoder is scored by the one that its held-out images chose.

    Args:
        model: As `load_encoder` takes it.
        data: Labelled images.
        protocol: The grid.
        readings: Layers and poolings to try, all from one pass over the images; by default the output.
        baselines: timm names to score too.
        train_split: What the heads learn from, and a tenth of which chooses.
        test_split: What is scored on; see `open_pair`.
    """
    protocol, readings = protocol or SweepProtocol(), readings or [Reading()]
    if not all(reading.taken_alike(readings[0]) for reading in readings):
        raise UserError("linear sweep: readings may differ in what is read, not in crop, workers, batch or store")
    pair = open_pair(data, train_split, test_split)
    scores: list[Score] = []
    grid: list[dict[str, Any]] = []
    crop: dict[str, Any] = {}
    for encoder in _contestants(model, baselines, readings[0]):
        sides = [
            dict(zip(map(str, readings), _features_of_all(encoder, source, pair, readings), strict=False))
            for source in (pair.train, pair.test)
        ]
        result = sweep(sides[0], pair.train_labels, sides[1], pair.test_labels, protocol)
        best = result.chosen
        note = f"{best.reading}, lr {best.lr:g}, decay {best.weight_decay:g}" + (", normed" if best.norm else "")
        scores.append(_score(encoder, result.accuracy, pair, note))
        grid = grid or [vars(head) for head in result.grid]
        crop = crop or preprocessing_settings(encoder.preprocessing if encoder else {})
    settings = {"kind": "linear sweep", **vars(protocol), "selection": HELD_OUT_CHOOSES, **crop}
    settings["layers"] = [str(reading) for reading in readings]
    name = f"linear sweep of {len(grid)} heads{_of(*readings)}"
    return Judgement(name, pair.description, {**settings, **data_settings(pair)}, scores, grid=grid)


def evaluate_finetune(
    model: str,
    data: DataConfig,
    protocol: str | FinetuneProtocol,
    *,
    changes: Mapping[str, Any] | None = None,
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
        protocol: How, or its name; see `FinetuneProtocol.named`.
        changes: Attributes of the protocol that are to be others.
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
    changes = dict(changes or {})
    seed = changes.get("seed", 0) if isinstance(protocol, str) else protocol.seed
    chosen = choose_subset(pair.train, pair.train_labels.numpy(), labels, seed)
    if isinstance(protocol, str):
        protocol = FinetuneProtocol.named(protocol, len(chosen) / len(pair.train))
    protocol = replace(protocol, **changes)
    source, known = pair.train.subset(chosen), pair.train_labels[torch.from_numpy(chosen)]
    encoder = load_encoder(model)
    if encoder.channels != 3:
        raise UserError(f"{model}: fine-tuning takes encoders of RGB; kNN and linear evaluation take any channels")
    contestants = [(encoder, neck)]
    contestants += [(encoder.random_twin(protocol.seed), None)] if scratch else []
    contestants += [(load_encoder(name), None) for name in baselines]
    scores = []
    for contestant, its_neck in contestants:
        name = "from scratch" if contestant.description == "random init" else contestant.description
        say(name)
        options: dict[str, Any] = {"neck": its_neck, "workers": workers, "say": say}
        with explain_death():
            classifier = finetune(contestant, source, known, len(pair.classes), protocol, **options)
        right = classify(classifier, contestant, pair.test, workers) == pair.test_labels
        scores.append(replace(_score(contestant, float(right.float().mean()), pair), encoder=name))
    settings = {"kind": "finetune", **vars(protocol), "neck": neck is not None, "selection": "none, the last epoch"}
    settings |= {**preprocessing_settings(encoder.preprocessing), **data_settings(pair)}
    settings |= {"labelled_images": len(chosen), "chosen": digest_of(chosen)}
    named = f"finetune {protocol.name}, {protocol.epochs} epochs, {labels} of the labels ({len(chosen)})"
    return Judgement(named, pair.description, settings, scores)


def _of(*readings: Reading) -> str:
    """What an evaluation's name says of what is read, where that is not the output."""
    return ", " + ", ".join(map(str, readings)) if any(reading.of_blocks for reading in readings) else ""


def _score(encoder: Encoder | None, accuracy: float, pair: LabelledPair, note: str = "") -> Score:
    name, revision = (encoder.description, encoder.revision) if encoder else (RAW_PIXELS, "")
    interval = bootstrap_interval(accuracy, len(pair.test))
    return Score(name, accuracy, interval, note, encoder_revision=revision)


def _contestants(model: str, baselines: Sequence[str], reading: Reading) -> Iterator[Encoder | None]:
    """The encoder, its random twin, None for raw pixels if they are RGB, and the baselines."""
    encoder = _with_crop(load_encoder(model), reading)
    others = [_with_crop(load_encoder(name), reading) for name in baselines]
    yield encoder
    yield encoder.random_twin()
    if encoder.channels == 3:
        yield None
    yield from others


def _with_crop(encoder: Encoder, reading: Reading) -> Encoder:
    if not reading.crop_pct:
        return encoder
    if not 0.1 <= reading.crop_pct <= 1.0:
        raise UserError(f"--crop-pct: must lie between 0.1 and 1, not {reading.crop_pct:g}")
    return replace(encoder, preprocessing={**encoder.preprocessing, "crop_pct": reading.crop_pct})


def _features(encoder: Encoder | None, source: ImageSource, pair: LabelledPair, reading: Reading) -> Tensor:
    return _features_of_all(encoder, source, pair, [reading])[0]


def _features_of_all(
    encoder: Encoder | None, source: ImageSource, pair: LabelledPair, readings: Sequence[Reading]
) -> list[Tensor]:
    """By each reading; raw pixels have but one."""
    if encoder is None:
        return [raw_pixels(source, raw_pixel_side(pair.train))]
    return read_features(encoder, source, encoder.transform(), readings)


def _epochs_of(encoder: Encoder | None, pair: LabelledPair, reading: Reading) -> EpochFeatures:
    assert encoder is not None
    transform = encoder.training_transform()
    return lambda epoch: read_features(encoder, pair.train, transform, [reading], seed=epoch + 1)[0]
