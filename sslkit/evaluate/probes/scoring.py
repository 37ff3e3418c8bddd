"""Evaluations with labels: kNN, linear probes, a sweep of linear probes, and fine-tuning.

Each evaluation scores the encoder and its baselines: the same architecture with random weights, raw pixels, colour
histograms, and any timm models. Pretraining that does not beat random weights and pixels has learned nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sslkit.data.loading.shared_memory import explain_death
from sslkit.data.sources.image_source import DataConfig, ImageSource
from sslkit.errors import UserError
from sslkit.evaluate.evaluation_result import RANDOM_DRAWS, EvaluationResult, Score, score_of, score_of_draws
from sslkit.evaluate.features.compared_encoders import TransferOptions, frozen_encoders, in_turn, trained_encoders
from sslkit.evaluate.features.devices import evaluation_device
from sslkit.evaluate.features.encoder import RANDOM_INIT, Encoder
from sslkit.evaluate.features.extraction import extract_features
from sslkit.evaluate.features.pixel_baselines import pixel_baselines, raw_pixel_side, raw_pixels
from sslkit.evaluate.features.readouts import Readout, extract_readouts
from sslkit.evaluate.label_subsets import choose_subset
from sslkit.evaluate.labelled_data import LabelledPair, Splits, open_pair
from sslkit.evaluate.probes.finetune import FinetuneProtocol, finetune
from sslkit.evaluate.probes.knn import KnnProtocol, check_neighbours, is_correct, predict
from sslkit.evaluate.probes.linear import SELECTED_ON_HELD_OUT, EpochFeatures, LinearProtocol, linear_accuracy
from sslkit.evaluate.probes.sweep import SweepProtocol, sweep
from sslkit.evaluate.protocol import data_settings, digest_of, preprocessing_settings

Row = tuple[Encoder | str, Tensor, str]  # encoder or name of a pixel baseline, `is_correct`, and what was chosen
Features = Callable[[ImageSource], list[Tensor]]  # of the training or the test images, for each readout


def evaluate_knn(
    model: str,
    data: DataConfig,
    protocol: KnnProtocol | None = None,
    readout: Readout | None = None,
    *,
    baselines: Sequence[str | Encoder] = (),
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
    baselines: Sequence[str | Encoder] = (),
    splits: Splits | None = None,
) -> list[EvaluationResult]:
    """Evaluate by several kNN protocols. Features and neighbours are computed once for all of them.

    Args:
        model: As for `load_encoder`.
        data: Labelled images.
        protocols: Numbers of neighbours and temperatures.
        readout: Layer, pooling and crop. Default: the model's output.
        baselines: timm models, or encoders, to score too.
        splits: The bank (``train``) and the queries (``test``).
    """
    readout = readout or Readout()
    pair = _open_splits(data, splits)
    check_neighbours(protocols, len(pair.train))
    rows: list[list[Row]] = [[] for _ in protocols]
    device = evaluation_device()
    own, encoders = frozen_encoders(model, baselines, readout, RANDOM_DRAWS)
    for encoder, features in _compared(encoders, pair, [readout]):
        # Pixels are always centred: the mean brightness hides the differences between images.
        is_pixels = isinstance(encoder, str)
        used = [replace(protocol, centre=True) if is_pixels else protocol for protocol in protocols]
        bank, queries = (features(source)[0] for source in (pair.train, pair.test))
        # The bank stays on disk, or in memory, and passes through the device once, in blocks.
        predictions = predict(queries.to(device), bank, pair.train_labels, len(pair.classes), used)
        for found, predicted in zip(rows, predictions, strict=True):
            found.append((encoder, is_correct(predicted, pair.test_labels), ""))
    others = readout.settings(), preprocessing_settings(own.preprocessing), data_settings(pair)
    names = [f"{protocol}{_readout_suffix(readout)}" for protocol in protocols]
    return [
        EvaluationResult(name, pair.description, protocol.settings(*others), _scores(found))
        for name, protocol, found in zip(names, protocols, rows, strict=True)
    ]


def evaluate_linear(
    model: str,
    data: DataConfig,
    protocol: str = "logistic",
    readout: Readout | None = None,
    *,
    augment: bool = True,
    epochs: int = 0,
    baselines: Sequence[str | Encoder] = (),
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
    # The papers' protocols train for many epochs.
    own, encoders = frozen_encoders(model, baselines, readout, RANDOM_DRAWS if protocol == "logistic" else 1)
    rows: list[Row] = []
    settings: dict[str, Any] = {}
    for encoder, features in _compared(encoders, pair, [readout]):
        used = LinearProtocol.from_name(protocol, is_vit=isinstance(encoder, Encoder) and encoder.is_vit)
        used = replace(used, epochs=epochs or used.epochs)
        test = features(pair.test)[0]
        train: Tensor | EpochFeatures
        if isinstance(encoder, Encoder) and augment and used.name != "logistic":
            train = _augmented_features(encoder, pair.train, readout)
        else:
            train = features(pair.train)[0]
        score = linear_accuracy(train, pair.train_labels, test, pair.test_labels, used)
        rows.append((encoder, score.correct, score.chosen))
        if encoder is own:
            settings = {"kind": "linear", **used.settings(), "augment": callable(train), "selection": used.selection}
    settings |= {**preprocessing_settings(own.preprocessing), **readout.settings(), **data_settings(pair)}
    return EvaluationResult(f"linear {protocol}{_readout_suffix(readout)}", pair.description, settings, _scores(rows))


def evaluate_sweep(
    model: str,
    data: DataConfig,
    protocol: SweepProtocol | None = None,
    readouts: Sequence[Readout] = (),
    *,
    baselines: Sequence[str | Encoder] = (),
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
    rows: list[Row] = []
    grid: list[dict[str, Any]] = []
    own, encoders = frozen_encoders(model, baselines, readouts[0], 1)
    for encoder, features in _compared(encoders, pair, readouts):
        train, test = (
            dict(zip(map(str, readouts), features(source), strict=False)) for source in (pair.train, pair.test)
        )
        result = sweep(train, pair.train_labels, test, pair.test_labels, protocol)
        best = result.chosen
        note = f"{best.readout}, lr {best.lr:g}, decay {best.weight_decay:g}" + (", normed" if best.norm else "")
        rows.append((encoder, result.correct, note))
        grid = grid or [head.row() for head in result.grid]
    settings = {"kind": "linear sweep", **vars(protocol), "selection": SELECTED_ON_HELD_OUT}
    settings |= {**preprocessing_settings(own.preprocessing), "layers": [str(readout) for readout in readouts]}
    name = f"linear sweep of {len(grid)} heads{_readout_suffix(*readouts)}"
    return EvaluationResult(name, pair.description, {**settings, **data_settings(pair)}, _scores(rows), grid=grid)


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
    rows: list[Row] = []
    for encoder in in_turn(encoders):
        options.log_message(encoder.description)
        training["neck"] = neck if encoder is encoders[0] else None
        with explain_death():
            classifier = finetune(encoder, source, train_labels, len(pair.classes), protocol, **training)
        device = next(classifier.parameters()).device
        logits = extract_features(classifier, pair.test, encoder.transform(), device=device, workers=options.workers)
        rows.append((encoder, is_correct(logits.argmax(dim=1), pair.test_labels), ""))
    settings = {"kind": "finetune", **vars(protocol), "neck": neck is not None, "selection": "none, the last epoch"}
    settings |= {**preprocessing_settings(encoders[0].preprocessing), **data_settings(pair)}
    settings |= {"labelled_images": len(chosen), "chosen": digest_of(chosen)}
    name = f"finetune {protocol.name}, {protocol.epochs} epochs, {labels} of the labels ({len(chosen)})"
    return EvaluationResult(name, pair.description, settings, _scores(rows))


def _open_splits(data: DataConfig, splits: Splits | None) -> LabelledPair:
    splits = splits or Splits()
    return open_pair(data, splits.train or "train", splits.test)


def _readout_suffix(*readouts: Readout) -> str:
    """Appended to an evaluation's name if it reads something else than the model's output."""
    return ", " + ", ".join(map(str, readouts)) if any(readout.reads_blocks for readout in readouts) else ""


def _scores(rows: Sequence[Row]) -> list[Score]:
    """Scores of what was compared, the encoder first, and its differences from the others."""
    scores, own = [], rows[0][1]
    draws = [correct for encoder, correct, _ in rows if _is_random(encoder)]
    for encoder, correct, note in rows:
        name, revision = (encoder, "") if isinstance(encoder, str) else (encoder.description, encoder.revision)
        if not _is_random(encoder):
            scores.append(score_of(name, correct, None if correct is own else own, note=note, revision=revision))
        elif correct is draws[0]:
            scores.append(score_of_draws(name, draws, own, note=note))
    return scores


def _is_random(encoder: Encoder | str) -> bool:
    return isinstance(encoder, Encoder) and encoder.description == RANDOM_INIT


def _compared(
    encoders: Iterable[Encoder | None], pair: LabelledPair, readouts: Sequence[Readout]
) -> Iterator[tuple[Encoder | str, Features]]:
    """Each encoder and its features of each readout; for None, the pixel baselines, with one for all readouts."""
    for encoder in in_turn(encoders):
        if encoder is not None:
            yield encoder, partial(_features, encoder, readouts)
            continue
        side, workers = raw_pixel_side(pair.train), readouts[0].workers
        pixels = [raw_pixels(source, side, workers) for source in (pair.train, pair.test)]
        for name, (train, test) in pixel_baselines(*pixels).items():
            yield name, partial(_of_split, pair, train, test)


def _features(encoder: Encoder, readouts: Sequence[Readout], source: ImageSource) -> list[Tensor]:
    return extract_readouts(encoder, source, encoder.transform(), readouts)


def _of_split(pair: LabelledPair, train: Tensor, test: Tensor, source: ImageSource) -> list[Tensor]:
    return [train if source is pair.train else test]


def _augmented_features(encoder: Encoder, source: ImageSource, readout: Readout) -> EpochFeatures:
    transform = encoder.training_transform()
    return lambda epoch: extract_readouts(encoder, source, transform, [readout], seed=epoch + 1)[0]
