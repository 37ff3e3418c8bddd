"""``sslkit eval``: judge an encoder, with labels or without."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslkit.cli.show import AsJson, conclude, show_diagnosis
from sslkit.errors import UserError

if TYPE_CHECKING:
    from sslkit.data.source import DataConfig
    from sslkit.evaluate.judge import Reading

evaluation = typer.Typer(help="Judge an encoder, with labels or without.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="Run folder, exported folder, hf_hub:user/repo, or timm name.")]
Data = Annotated[str, typer.Option("--data", help="Folder with a folder per class, datasets id, or builtin:NAME.")]
DataName = Annotated[str, typer.Option("--data-name", help="The data set's configuration, if it has several.")]
LabelColumn = Annotated[str, typer.Option(help="Column of labels, if it is not found by its type.")]
TrainSplit = Annotated[str, typer.Option(help="Split to learn from.")]
TestSplit = Annotated[str, typer.Option(help="Split to score on. Default: test or val, else a fifth held out.")]
Layer = Annotated[int | None, typer.Option(help="Mean-pooled block of this index instead of the output.")]
CropPct = Annotated[
    float, typer.Option(min=0, max=1, help="Share of the shorter side kept, 0.1 to 1; 0: the model's own.")
]
Baseline = Annotated[list[str] | None, typer.Option("--baseline", help="Also score this timm name; may repeat.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images.")]


@evaluation.command(epilog="Example: sslkit eval knn runs/quickstart --data builtin:fashion_mnist")
def knn(
    model: Model,
    data: Data,
    k: Annotated[int, typer.Option(help="Neighbours.")] = 20,
    temperature: Annotated[float, typer.Option(help="Votes weigh exp(similarity / temperature).")] = 0.07,
    centre: Annotated[bool, typer.Option("--centre", help="Subtract the bank's mean first (no paper does).")] = False,
    layer: Layer = None,
    crop_pct: CropPct = 0.0,
    data_name: DataName = "",
    label_column: LabelColumn = "",
    train_split: TrainSplit = "train",
    test_split: TestSplit = "",
    baseline: Baseline = None,
    workers: Workers = 0,
    as_json: AsJson = False,
) -> None:
    """Weighted k-nearest neighbours on frozen features, beside raw pixels and random init."""
    from sslkit.evaluate import KnnProtocol, evaluate_knn

    judgement = evaluate_knn(
        model,
        _data(data, data_name, label_column),
        KnnProtocol(k, temperature, centre),
        _reading(layer, crop_pct, workers),
        baselines=baseline or [],
        train_split=train_split,
        test_split=test_split,
    )
    conclude(model, judgement, as_json)


@evaluation.command(epilog="Example: sslkit eval linear runs/quickstart --data builtin:fashion_mnist")
def linear(
    model: Model,
    data: Data,
    protocol: Annotated[str, typer.Option(help="logistic, moco_v1 (also v2's) or moco_v3.")] = "logistic",
    augment: Annotated[
        bool, typer.Option(help="Random crops and mirrors in the SGD protocols, as in the papers.")
    ] = True,
    epochs: Annotated[int, typer.Option(min=0, help="Of the SGD protocols; 0: the paper's.")] = 0,
    layer: Layer = None,
    crop_pct: CropPct = 0.0,
    data_name: DataName = "",
    label_column: LabelColumn = "",
    train_split: TrainSplit = "train",
    test_split: TestSplit = "",
    baseline: Baseline = None,
    workers: Workers = 0,
    as_json: AsJson = False,
) -> None:
    """A linear classifier on frozen features, beside raw pixels and random init."""
    from sslkit.evaluate import evaluate_linear

    judgement = evaluate_linear(
        model,
        _data(data, data_name, label_column),
        protocol,
        _reading(layer, crop_pct, workers),
        augment=augment,
        epochs=epochs,
        baselines=baseline or [],
        train_split=train_split,
        test_split=test_split,
    )
    conclude(model, judgement, as_json)


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
    conclude(model, judgement, as_json)


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
    reading = _reading(layer, 0.0, workers)
    show_diagnosis(diagnose_encoder(model, source, reading, images=images, views=views, seed=seed), as_json)


def _data(path: str, name: str, label_column: str) -> "DataConfig":
    from sslkit.data.source import DataConfig

    if not path:
        raise UserError("--data: name a folder, a datasets id or builtin:fashion_mnist")
    return DataConfig(path=path, name=name or None, label_column=label_column or None)


def _reading(layer: int | None, crop_pct: float, workers: int) -> "Reading":
    from sslkit.evaluate.judge import Reading

    return Reading(layer, crop_pct, workers)
