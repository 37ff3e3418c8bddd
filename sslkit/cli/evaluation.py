"""``sslkit eval``: judge an encoder, with labels or without."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from sslkit.cli.show import AsJson, conclude, show_comparison, show_diagnosis
from sslkit.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sslkit.data.source import DataConfig
    from sslkit.evaluate.compare import Row
    from sslkit.evaluate.judge import Reading

Number = TypeVar("Number", int, float)

evaluation = typer.Typer(help="Judge an encoder, with labels or without.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="Run folder, exported folder, hf_hub:user/repo, or timm name.")]
Data = Annotated[str, typer.Option("--data", help="Folder with a folder per class, datasets id, or builtin:NAME.")]
DataName = Annotated[str, typer.Option("--data-name", help="The data set's configuration, if it has several.")]
LabelColumn = Annotated[str, typer.Option(help="Column of labels, if it is not found by its type.")]
TrainSplit = Annotated[str, typer.Option(help="Split to learn from.")]
TestSplit = Annotated[str, typer.Option(help="Split to score on. Default: test or val, else a fifth held out.")]
Layer = Annotated[int | None, typer.Option(help="Mean-pooled block of this index instead of the output.")]
LastBlocks = Annotated[int, typer.Option(min=0, help="Class tokens of so many last blocks side by side, as DINO.")]
CropPct = Annotated[
    float, typer.Option(min=0, max=1, help="Share of the shorter side kept, 0.1 to 1; 0: the model's own.")
]
Baseline = Annotated[list[str] | None, typer.Option("--baseline", help="Also score this timm name; may repeat.")]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="Keep features on disk for the next evaluation.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images.")]


@evaluation.command(epilog="Example: sslkit eval knn runs/quickstart --data builtin:fashion_mnist")
def knn(
    model: Model,
    data: Data,
    k: Annotated[str, typer.Option(help="Neighbours; several, such as 10,20,200, cost no more than one.")] = "20",
    temperature: Annotated[
        str, typer.Option(help="Votes weigh exp(similarity / temperature); several as with k.")
    ] = "0.07",
    protocol: Annotated[str, typer.Option(help="dino or instdisc, instead of k and temperature.")] = "",
    centre: Annotated[bool, typer.Option("--centre", help="Subtract the bank's mean first (no paper does).")] = False,
    layer: Layer = None,
    last_blocks: LastBlocks = 0,
    crop_pct: CropPct = 0.0,
    data_name: DataName = "",
    label_column: LabelColumn = "",
    train_split: TrainSplit = "train",
    test_split: TestSplit = "",
    baseline: Baseline = None,
    cache: Cache = True,
    workers: Workers = 0,
    as_json: AsJson = False,
) -> None:
    """Weighted k-nearest neighbours on frozen features, beside raw pixels and random init."""
    from sslkit.evaluate import KnnProtocol, evaluate_knn_grid

    if protocol:
        protocols = [dataclasses.replace(each, centre=centre) for each in KnnProtocol.named(protocol)]
    else:
        grid = itertools.product(_numbers("--k", k, int), _numbers("--temperature", temperature, float))
        protocols = [KnnProtocol(neighbours, each, centre) for neighbours, each in grid]
    judgements = evaluate_knn_grid(
        model,
        _data(data, data_name, label_column),
        protocols,
        _reading(layer, last_blocks, crop_pct, workers, cache),
        baselines=baseline or [],
        train_split=train_split,
        test_split=test_split,
    )
    conclude(model, judgements, as_json)


def _numbers(option: str, words: str, kind: "Callable[[str], Number]") -> "list[Number]":
    """Numbers with commas between."""
    try:
        return list(dict.fromkeys(kind(word) for word in words.split(",")))
    except ValueError:
        raise UserError(f"{option} {words}: write a number, or several with commas between") from None


@evaluation.command(epilog="Example: sslkit eval linear runs/quickstart --data builtin:fashion_mnist")
def linear(
    model: Model,
    data: Data,
    protocol: Annotated[str, typer.Option(help="logistic, moco_v1 (also v2's), moco_v3, simclr or dino.")] = "logistic",
    augment: Annotated[
        bool, typer.Option(help="Random crops and mirrors in the SGD protocols, as in the papers.")
    ] = True,
    epochs: Annotated[int, typer.Option(min=0, help="Of the SGD protocols; 0: the paper's.")] = 0,
    layer: Layer = None,
    last_blocks: LastBlocks = 0,
    crop_pct: CropPct = 0.0,
    data_name: DataName = "",
    label_column: LabelColumn = "",
    train_split: TrainSplit = "train",
    test_split: TestSplit = "",
    baseline: Baseline = None,
    cache: Cache = True,
    workers: Workers = 0,
    as_json: AsJson = False,
) -> None:
    """A linear classifier on frozen features, beside raw pixels and random init."""
    from sslkit.evaluate import evaluate_linear

    judgement = evaluate_linear(
        model,
        _data(data, data_name, label_column),
        protocol,
        _reading(layer, last_blocks, crop_pct, workers, cache),
        augment=augment,
        epochs=epochs,
        baselines=baseline or [],
        train_split=train_split,
        test_split=test_split,
    )
    conclude(model, [judgement], as_json)


@evaluation.command(epilog="Example: sslkit eval sweep runs/photos --data flowers --layers out,-2")
def sweep(
    model: Model,
    data: Data,
    lr: Annotated[str, typer.Option(help="Rates at batch 256.")] = "0.003,0.01,0.03,0.1,0.3,1,3,10",
    weight_decay: Annotated[str, typer.Option(help="Penalties.")] = "0,1e-5",
    norm: Annotated[
        str, typer.Option(help="BatchNorm without parameters before the head: no, yes or no,yes.")
    ] = "no,yes",
    layers: Annotated[
        str, typer.Option(help="out, blocks by number (-2: last but one), and last4: DINO's four class tokens.")
    ] = "out",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the features.")] = 50,
    batch_size: Annotated[int, typer.Option(min=2, help="Features of an update.")] = 256,
    seed: Annotated[int, typer.Option(help="Of held-out draw, initialisation and order.")] = 0,
    crop_pct: CropPct = 0.0,
    data_name: DataName = "",
    label_column: LabelColumn = "",
    train_split: TrainSplit = "train",
    test_split: TestSplit = "",
    baseline: Baseline = None,
    workers: Workers = 0,
    cache: Cache = True,
    as_json: AsJson = False,
) -> None:
    """Many linear heads in one pass over frozen features; the best on held-out images is scored."""
    from sslkit.evaluate.judge import evaluate_sweep
    from sslkit.evaluate.sweep import SweepProtocol

    rates, decays = _numbers("--lr", lr, float), _numbers("--weight-decay", weight_decay, float)
    words = norm.split(",")
    if not set(words) <= {"no", "yes"}:
        raise UserError(f"--norm {norm}: write no, yes or no,yes")
    norms = tuple(word == "yes" for word in words)
    judgement = evaluate_sweep(
        model,
        _data(data, data_name, label_column),
        SweepProtocol(tuple(rates), tuple(decays), norms, epochs, batch_size, seed),
        [_named_reading(word, crop_pct, workers, cache) for word in layers.split(",")],
        baselines=baseline or [],
        train_split=train_split,
        test_split=test_split,
    )
    conclude(model, [judgement], as_json)


def _named_reading(word: str, crop_pct: float, workers: int, cache: bool) -> "Reading":
    """What `--layers` means by ``out``, ``-2`` or ``last4``."""
    try:
        last = int(word.removeprefix("last")) if word.startswith("last") else 0
        layer = None if word == "out" or last else int(word)
    except ValueError:
        raise UserError(f"--layers: {word!r} is not out, a block's number, or last and a number") from None
    return _reading(layer, last, crop_pct, workers, cache)


@evaluation.command(epilog="Example: sslkit eval finetune runs/photos --data flowers --labels 10% --protocol swav")
def finetune(
    model: Model,
    data: Data,
    protocol: Annotated[
        str, typer.Option(help="deit, moco_v3 (transfer), simclr or swav (both: few labels).")
    ] = "deit",
    labels: Annotated[str, typer.Option(help="all, 10%, 5-shot, or a file that names images, one a line.")] = "all",
    epochs: Annotated[int, typer.Option(min=0, help="0: the protocol's.")] = 0,
    batch_size: Annotated[int, typer.Option(min=0, help="0: the protocol's.")] = 0,
    lr: Annotated[float, typer.Option(min=0, help="At the protocol's reference batch; 0: the protocol's.")] = 0.0,
    layer_decay: Annotated[
        float, typer.Option(min=0.1, max=1, help="Each block's rate is the next one's times this.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the choice of labels and of training.")] = 0,
    head_layers: Annotated[
        int, typer.Option(min=0, help="Keep so many layers of a run's projector, as SimCLR v2 does with 1.")
    ] = 0,
    scratch: Annotated[bool, typer.Option(help="Also train the architecture from random weights.")] = True,
    data_name: DataName = "",
    label_column: LabelColumn = "",
    train_split: TrainSplit = "train",
    test_split: TestSplit = "",
    baseline: Baseline = None,
    workers: Workers = 0,
    as_json: AsJson = False,
) -> None:
    """Train the whole encoder on all or a few of the labels, beside the same from random weights."""
    from sslkit.evaluate.finetune import FinetuneProtocol
    from sslkit.evaluate.judge import evaluate_finetune

    own = FinetuneProtocol.named(protocol, labels)
    own = dataclasses.replace(
        own,
        epochs=epochs or own.epochs,
        batch_size=batch_size or own.batch_size,
        base_lr=lr or own.base_lr,
        layer_decay=layer_decay,
        seed=seed,
    )
    neck = None
    if head_layers:
        from sslkit.engine.projector import first_projector_layers

        neck = first_projector_layers(Path(model), head_layers)
    judgement = evaluate_finetune(
        model,
        _data(data, data_name, label_column),
        own,
        labels=labels,
        neck=neck,
        scratch=scratch,
        baselines=baseline or [],
        train_split=train_split,
        test_split=test_split,
        workers=workers,
        say=lambda sentence: print(f"sslkit: {sentence}", file=sys.stderr),
    )
    conclude(model, [judgement], as_json)


@evaluation.command(epilog="Example: sslkit eval compare runs/a runs/b")
def compare(
    models: Annotated[list[str], typer.Argument(help="Run folders, or files that hold what --json printed.")],
    protocol: Annotated[str, typer.Option(help="Only evaluations whose name starts so, such as knn.")] = "",
    as_json: AsJson = False,
) -> None:
    """Scores side by side, of the same protocol or not at all."""
    from sslkit.evaluate.compare import comparable

    show_comparison(comparable({model: _judged(Path(model)) for model in models}, protocol), as_json)


def _judged(path: Path) -> "list[Row]":
    """Evaluations of a run folder, or of a file that holds a judgement."""
    from sslkit.engine.journal import read_lines

    if (path / "recipe.toml").is_file():
        rows = [row for row in read_lines(path / "results.jsonl") if row.get("by") == "eval"]
        return [row for row in rows if _is_score(row)]
    try:
        printed = json.loads(path.read_text(encoding="utf-8"))
        judgements = printed if isinstance(printed, list) else [printed]
        rows = [{**judgement, **judgement["scores"][0]} for judgement in judgements]
        if not all(map(_is_score, rows)):
            raise ValueError("not scores")
        return rows
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(f"eval compare: {path} is neither a run folder nor a file that --json wrote") from error


def _is_score(row: "Row") -> bool:
    """Whether a line has what a comparison shows, of the types it has it in."""
    kinds = {"evaluation": str, "protocol": dict, "protocol_hash": str, "accuracy": int | float}
    ends = row.get("interval")
    return all(isinstance(row.get(key), kind) for key, kind in kinds.items()) and (
        not ends or (isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends))
    )


@evaluation.command(epilog="Example: sslkit eval detect runs/photos --data VOCdevkit --batch-size 4 --steps 6000")
def detect(
    model: Model,
    data: Annotated[str, typer.Option("--data", help="Folder in VOC or COCO format.")],
    protocol: Annotated[str, typer.Option(help="voc or coco: MoCo's numbers.")] = "voc",
    arch: Annotated[str, typer.Option(help="c4 (ResNets) or fpn. Default: c4 for ResNets, else fpn.")] = "",
    masks: Annotated[bool, typer.Option("--masks", help="Mask R-CNN: learn and score masks too.")] = False,
    steps: Annotated[int, typer.Option(min=0, help="Updates; 0: the protocol's.")] = 0,
    batch_size: Annotated[int, typer.Option(min=0, help="Pictures of an update; 0: the protocol's.")] = 0,
    lr: Annotated[float, typer.Option(min=0, help="At 16 pictures; 0: the protocol's.")] = 0.0,
    short_side: Annotated[int, typer.Option(min=0, help="Tested shorter side in pixels; 0: the protocol's.")] = 0,
    regions: Annotated[
        int, typer.Option(min=0, help="Of a picture, learned from; fewer are faster on a CPU. 0: the protocol's 512.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of new layers, order and augmentation.")] = 0,
    scratch: Annotated[bool, typer.Option(help="Also train the architecture from random weights.")] = True,
    train_split: Annotated[str, typer.Option(help="Split to learn from. Default: trainval or train.")] = "",
    test_split: Annotated[str, typer.Option(help="Split to score on. Default: test, else val.")] = "",
    baseline: Baseline = None,
    workers: Workers = 0,
    as_json: AsJson = False,
) -> None:
    """Train a Faster or Mask R-CNN over the encoder, beside the same from random weights; AP as COCO defines it."""
    from sslkit.evaluate.detect import DetectProtocol, evaluate_detect

    own = DetectProtocol.named(protocol)
    own = own.at_short_side(short_side) if short_side else own
    own = dataclasses.replace(
        own,
        steps=steps or own.steps,
        batch_size=batch_size or own.batch_size,
        base_lr=lr or own.base_lr,
        regions=regions or own.regions,
        seed=seed,
    )
    judgement = evaluate_detect(
        model,
        data,
        own,
        arch=arch,
        masks=masks,
        scratch=scratch,
        baselines=baseline or [],
        train_split=train_split,
        test_split=test_split,
        workers=workers,
        say=lambda sentence: print(f"sslkit: {sentence}", file=sys.stderr),
    )
    conclude(model, [judgement], as_json)


@evaluation.command(epilog="Example: sslkit eval diagnose runs/quickstart --data builtin:fashion_mnist")
def diagnose(
    model: Model,
    data: Annotated[str, typer.Option("--data", help="Any images: folder, datasets id, or builtin:NAME.")],
    images: Annotated[int, typer.Option(min=2, help="At most so many, drawn by --seed.")] = 1000,
    views: Annotated[int, typer.Option(min=2, help="Random crops and mirrors of each.")] = 8,
    split: Annotated[str, typer.Option(help="Split to draw from.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Of the draw, the views and the random twin.")] = 0,
    layer: Layer = None,
    data_name: DataName = "",
    workers: Workers = 0,
    as_json: AsJson = False,
) -> None:
    """What features tell without labels: do they collapse, how many directions do they use, do views agree."""
    from sslkit.evaluate.diagnose import diagnose_encoder

    source = _data(data, data_name, "").model_copy(update={"split": split})
    reading = _reading(layer, 0, 0.0, workers, cache=False)
    show_diagnosis(diagnose_encoder(model, source, reading, images=images, views=views, seed=seed), as_json)


def _data(path: str, name: str, label_column: str) -> "DataConfig":
    from sslkit.data.source import DataConfig

    if not path:
        raise UserError("--data: name a folder, a datasets id or builtin:fashion_mnist")
    return DataConfig(path=path, name=name or None, label_column=label_column or None)


def _reading(layer: int | None, last_blocks: int, crop_pct: float, workers: int, cache: bool) -> "Reading":
    from sslkit.evaluate.judge import Reading
    from sslkit.evaluate.store import FeatureStore

    return Reading(layer, last_blocks, crop_pct, workers, store=FeatureStore.default() if cache else None)
