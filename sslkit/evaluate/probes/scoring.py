"""Evaluations with labels: kNN, linear probes, a sweep of linear probes, and fine-tuning.

Each evaluation scores the encoder and its baselines: the same architecture with random weights, raw pixels, and any
timm models. Pretraining that does not beat random weights and raw pixels has learned nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sslkit.data.loading.shared_memory import explain_death
from sslkit.data.sources.image_source import DataConfig, ImageSource
from sslkit.errors import UserError
from sslkit.evaluate.evaluation_result import EvaluationResult, Score, bootstrap_interval
from sslkit.evaluate.features.compared_encoders import (
    RAW_PIXELS,
    TransferOptions,
    frozen_encoders,
    in_turn,
    trained_encoders,
)
from sslkit.evaluate.features.encoder import Encoder
from sslkit.evaluate.features.extraction import extract_features, raw_pixel_side, raw_pixels
from sslkit.evaluate.features.readouts import Readout, extract_readouts
from sslkit.evaluate.label_subsets import choose_subset
from sslkit.evaluate.labelled_data import LabelledPair, Splits, open_pair
from sslkit.evaluate.probes.finetune import FinetuneProtocol, finetune
from sslkit.evaluate.probes.knn import KnnProtocol, check_neighbours, predict, share_correct
from sslkit.evaluate.probes.linear import SELECTED_ON_HELD_OUT, EpochFeatures, LinearProtocol, linear_accuracy
from sslkit.evaluate.probes.sweep import SweepProtocol, sweep
from sslkit.evaluate.protocol import data_settings, digest_of, preprocessing_settings


def evaluate_knn(
    model: str,
    data: DataConfig,
    protocol: KnnProtocol | None = None,
    readout: Readout | None = None,
    *,
    baselines: Sequence[str] = (),
    splits: Splits | None = None,
) -> EvaluationResult:
    """Evaluate by one kNN protocol, by default `KnnProtocol()`. Arguments as for `evaluate_knn_grid`."""
    protocols = [protocol or KnnProtocol()]
    return evaluate_knn_grid(model, data, protocols, readout, baselines=baselines, splits=splits)[0]


def evaluate_knn_grid(
    model: str,
    data: DataConfig,
    protocols: Sequence[KnnProtocol],
    readout: Readout | None = None,
    *,
    baselines: Sequence[str] = (),
    splits: Splits | None = None,
) -> list[EvaluationResult]:
    """Evaluate by several kNN protocols. Features and neighbours are computed once for all of them.

    Args:
        model: As for `load_encoder`.
        data: Labelled images.
        protocols: Numbers of neighbours and temperatures.
        readout: Layer, pooling and crop. Default: the model's output.
        baselines: timm models to score too.
        splits: The bank (``train``) and the queries (``test``).
    """
    readout = readout or Readout()
    pair = _open_splits(data, splits)
    check_neighbours(protocols, len(pair.train))
    scores: list[list[Score]] = [[] for _ in protocols]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own, encoders = frozen_encoders(model, baselines, readout)
    for encoder in in_turn(encoders):
        # Raw pixels are always centred: the mean brightness hides the differences between images.
        used = [protocol if encoder else replace(protocol, centre=True) for protocol in protocols]
        bank, queries = (_features(encoder, source, pair, [readout])[0] for source in (pair.train, pair.test))
        predictions = predict(queries.to(device), bank, pair.train_labels, len(pair.classes), used)
        for found, predicted in zip(scores, predictions, strict=True):
            found.append(_score(encoder, share_correct(predicted, pair.test_labels), pair))
    others = readout.settings(), preprocessing_settings(own.preprocessing), data_settings(pair)
    names = [f"{protocol}{_readout_suffix(readout)}" for protocol in protocols]
    return [
        EvaluationResult(name, pair.description, protocol.settings(*others), found)
        for name, protocol, found in zip(names, protocols, scores, strict=True)
    ]


def evaluate_linear(
    model: str,
    data: DataConfig,
    protocol: str = "logistic",
    readout: Readout | None = None,
    *,
    augment: bool = True,
    epochs: int = 0,
    baselines: Sequence[str] = (),
    splits: Splits | None = None,
) -> EvaluationResult:
    """Evaluate by a linear classifier on frozen features. Other arguments as for `evaluate_knn_grid`.

    Args:
        protocol: ``logistic``, or the name of a paper's protocol; see `LinearProtocol`.
        augment: Whether the SGD protocols train on random crops and flips, as the papers do, or on the features of
            the centre crop. ``logistic`` always uses the centre crop.
        epochs: Epochs of the SGD protocols; 0 for the paper's.
    """
    if epochs and protocol == "logistic":
        raise UserError("--epochs: does not apply to the protocol logistic, which runs to convergence; omit it")
    readout = readout or Readout()
    pair = _open_splits(data, splits)
    own, encoders = frozen_encoders(model, baselines, readout)
    scores = []
    settings: dict[str, Any] = {}
    for encoder in in_turn(encoders):
        used = LinearProtocol.from_name(protocol, is_vit=encoder is not None and encoder.is_vit)
        used = replace(used, epochs=epochs or used.epochs)
        test = _features(encoder, pair.test, pair, [readout])[0]
        train: Tensor | EpochFeatures
        if encoder is not None and augment and used.name != "logistic":
            train = _augmented_features(encoder, pair.train, readout)
        else:
            train = _features(encoder, pair.train, pair, [readout])[0]
        score = linear_accuracy(train, pair.train_labels, test, pair.test_labels, used)
        scores.append(_score(encoder, score.accuracy, pair, score.chosen))
        if encoder is own:
            settings = {"kind": "linear", **used.settings(), "augment": callable(train), "selection": used.selection}
    settings |= {**preprocessing_settings(own.preprocessing), **readout.settings(), **data_settings(pair)}
    return EvaluationResult(f"linear {protocol}{_readout_suffix(readout)}", pair.description, settings, scores)


def evaluate_sweep(
    model: str,
    data: DataConfig,
    protocol: SweepProtocol | None = None,
    readouts: Sequence[Readout] = (),
    *,
    baselines: Sequence[str] = (),
    splits: Splits | None = None,
) -> EvaluationResult:
    """Evaluate by a sweep of linear probes. Each encoder is scored by the head that its held-out images select.

    ``readouts`` are layers and poolings to try, extracted in one pass. A tenth of the training images is held out.
    Other arguments as for `evaluate_knn_grid`.
    """
    protocol, readouts = protocol or SweepProtocol(), readouts or [Readout()]
    if not all(readout.shares_pass_with(readouts[0]) for readout in readouts):
        raise UserError("linear sweep: readouts may differ in layers and pooling only, not in crop, workers or store")
    pair = _open_splits(data, splits)
    scores: list[Score] = []
    grid: list[dict[str, Any]] = []
    own, encoders = frozen_encoders(model, baselines, readouts[0])
    for encoder in in_turn(encoders):
        train, test = (
            dict(zip(map(str, readouts), _features(encoder, source, pair, readouts), strict=False))
            for source in (pair.train, pair.test)
        )
        result = sweep(train, pair.train_labels, test, pair.test_labels, protocol)
        best = result.chosen
        note = f"{best.readout}, lr {best.lr:g}, decay {best.weight_decay:g}" + (", normed" if best.norm else "")
        scores.append(_score(encoder, result.accuracy, pair, note))
        grid = grid or [head.row() for head in result.grid]
    settings = {"kind": "linear sweep", **vars(protocol), "selection": SELECTED_ON_HELD_OUT}
    settings |= {**preprocessing_settings(own.preprocessing), "layers": [str(readout) for readout in readouts]}
    name = f"linear sweep of {len(grid)} heads{_readout_suffix(*readouts)}"
    return EvaluationResult(name, pair.description, {**settings, **data_settings(pair)}, scores, grid=grid)


def evaluate_finetune(
    model: str,
    data: DataConfig,
    protocol: str | FinetuneProtocol,
    *,
    changes: Mapping[str, Any] | None = None,
    labels: str = "all",
    neck: nn.Module | None = None,
    splits: Splits | None = None,
    options: TransferOptions | None = None,
) -> EvaluationResult:
    """Fine-tune the encoder and test the last epoch; the baseline is the same training from random weights.

    Args:
        model: As for `load_encoder`; ``data`` and ``splits`` as for `evaluate_knn_grid`.
        protocol: Hyperparameters, or the name of a protocol; see `FinetuneProtocol.from_name`.
        changes: Attributes of the protocol to replace.
        labels: Which labelled images to use; see `choose_subset`.
        neck: First layers of the model's projector, fine-tuned with the encoder. Baselines have none.
        options: Baselines, workers and progress messages.
    """
    options = options or TransferOptions()
    pair = _open_splits(data, splits)
    changes = dict(changes or {})
    seed = changes.get("seed", 0) if isinstance(protocol, str) else protocol.seed
    chosen = choose_subset(pair.train, pair.train_labels.numpy(), labels, seed)
    if isinstance(protocol, str):
        protocol = FinetuneProtocol.from_name(protocol, len(chosen) / len(pair.train))
    protocol = replace(protocol, **changes)
    source, train_labels = pair.train.subset(chosen), pair.train_labels[torch.from_numpy(chosen)]
    encoders = trained_encoders(model, "fine-tuning", options, protocol.seed)
    training: dict[str, Any] = {"workers": options.workers, "log_message": options.log_message}
    scores = []
    for encoder in in_turn(encoders):
        options.log_message(encoder.description)
        training["neck"] = neck if encoder is encoders[0] else None
        with explain_death():
            classifier = finetune(encoder, source, train_labels, len(pair.classes), protocol, **training)
        device = next(classifier.parameters()).device
        logits = extract_features(classifier, pair.test, encoder.transform(), device=device, workers=options.workers)
        scores.append(_score(encoder, share_correct(logits.argmax(dim=1), pair.test_labels), pair))
    settings = {"kind": "finetune", **vars(protocol), "neck": neck is not None, "selection": "none, the last epoch"}
    settings |= {**preprocessing_settings(encoders[0].preprocessing), **data_settings(pair)}
    settings |= {"labelled_images": len(chosen), "chosen": digest_of(chosen)}
    name = f"finetune {protocol.name}, {protocol.epochs} epochs, {labels} of the labels ({len(chosen)})"
    return EvaluationResult(name, pair.description, settings, scores)


def _open_splits(data: DataConfig, splits: Splits | None) -> LabelledPair:
    splits = splits or Splits()
    return open_pair(data, splits.train or "train", splits.test)


def _readout_suffix(*readouts: Readout) -> str:
    """Appended to an evaluation's name if it reads something else than the model's output."""
    return ", " + ", ".join(map(str, readouts)) if any(readout.reads_blocks for readout in readouts) else ""


def _score(encoder: Encoder | None, accuracy: float, pair: LabelledPair, note: str = "") -> Score:
    name, revision = (encoder.description, encoder.revision) if encoder else (RAW_PIXELS, "")
    return Score(name, accuracy, bootstrap_interval(accuracy, len(pair.test)), note, encoder_revision=revision)


def _features(
    encoder: Encoder | None, source: ImageSource, pair: LabelledPair, readouts: Sequence[Readout]
) -> list[Tensor]:
    """Features of each readout; of raw pixels (None), one for all readouts."""
    if encoder is None:
        return [raw_pixels(source, raw_pixel_side(pair.train))]
    return extract_readouts(encoder, source, encoder.transform(), readouts)


def _augmented_features(encoder: Encoder, source: ImageSource, readout: Readout) -> EpochFeatures:
    transform = encoder.training_transform()
    return lambda epoch: extract_readouts(encoder, source, transform, [readout], seed=epoch + 1)[0]
