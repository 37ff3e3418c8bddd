"""``sslkit eval``: judge an encoder, with labels or without."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslkit.cli.options import (
    Background,
    Baseline,
    Frozen,
    ImageColumn,
    Labelled,
    Layer,
    Model,
    Scratch,
    Workers,
    data_config,
    find_background,
    numbers,
    override,
    shared,
)
from sslkit.cli.output import AsJson, conclude, show_comparison, show_diagnosis
from sslkit.cli.startup import quick_imports
from sslkit.errors import UserError, check_path
from sslkit.terminal import say

if TYPE_CHECKING:
    from sslkit.evaluate.compare_scores import Row

evaluation = typer.Typer(help="Judge an encoder, with labels or without.", no_args_is_help=True)


@evaluation.command(epilog="Example: sslkit eval knn runs/quickstart --data builtin:fashion_mnist")
@shared
def knn(
    model: Model,
    labelled: Labelled,
    frozen: Frozen,
    k: Annotated[str, typer.Option(help="Neighbours; several, such as 10,20,200, cost no more than one.")] = "20",
    temperature: Annotated[
        str, typer.Option(help="Votes weigh exp(similarity / temperature); several as with k.")
    ] = "0.07",
    protocol: Annotated[str, typer.Option(help="dino or instdisc, instead of k and temperature.")] = "",
    centre: Annotated[bool, typer.Option("--centre", help="Subtract the bank's mean first (no paper does).")] = False,
    layer: Layer = "out",
    as_json: AsJson = False,
) -> None:
    """Weighted k-nearest neighbours on frozen features, beside raw pixels and random init."""
    with quick_imports():
        from sslkit.evaluate import KnnProtocol, evaluate_knn_grid

    if protocol:
        protocols = [dataclasses.replace(each, centre=centre) for each in KnnProtocol.from_name(protocol)]
    else:
        grid = itertools.product(numbers("--k", k, int), numbers("--temperature", temperature, float))
        protocols = [KnnProtocol(neighbours, each, centre) for neighbours, each in grid]
    results = evaluate_knn_grid(
        model,
        labelled.config(model),
        protocols,
        frozen.readout(layer),
        **labelled.comparison(),
    )
    conclude(model, results, as_json)


@evaluation.command(epilog="Example: sslkit eval linear runs/quickstart --data builtin:fashion_mnist")
@shared
def linear(
    model: Model,
    labelled: Labelled,
    frozen: Frozen,
    protocol: Annotated[
        str, typer.Option(help="logistic, moco_v1 (also v2's), moco_v3, simclr, byol, swav or dino.")
    ] = "logistic",
    augment: Annotated[
        bool, typer.Option(help="Random crops and mirrors in the SGD protocols, as in the papers.")
    ] = True,
    epochs: Annotated[int, typer.Option(min=0, help="Of the SGD protocols; 0: the paper's.")] = 0,
    layer: Layer = "out",
    as_json: AsJson = False,
) -> None:
    """A linear classifier on frozen features, beside raw pixels and random init."""
    with quick_imports():
        from sslkit.evaluate import evaluate_linear

    result = evaluate_linear(
        model,
        labelled.config(model),
        protocol,
        frozen.readout(layer),
        augment=augment,
        epochs=epochs,
        **labelled.comparison(),
    )
    conclude(model, [result], as_json)


@evaluation.command(epilog="Example: sslkit eval sweep runs/photos --data flowers --layer out,-2")
@shared
def sweep(
    model: Model,
    labelled: Labelled,
    frozen: Frozen,
    lr: Annotated[str, typer.Option(help="Rates at batch 256.")] = "0.003,0.01,0.03,0.1,0.3,1,3,10",
    weight_decay: Annotated[str, typer.Option(help="Penalties.")] = "0,1e-5",
    norm: Annotated[
        str, typer.Option(help="BatchNorm without parameters before the head: no, yes or no,yes.")
    ] = "no,yes",
    layer: Annotated[
        str, typer.Option("--layer", "--layers", help="Readings as eval linear has them, with commas between.")
    ] = "out",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the features.")] = 50,
    batch_size: Annotated[int, typer.Option(min=2, help="Features of an update.")] = 256,
    seed: Annotated[int, typer.Option(help="Of held-out draw, initialisation and order.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Many linear heads in one pass over frozen features; the best on held-out images is scored."""
    with quick_imports():
        from sslkit.evaluate.probes.scoring import evaluate_sweep
        from sslkit.evaluate.probes.sweep import SweepProtocol

    rates, decays = numbers("--lr", lr, float), numbers("--weight-decay", weight_decay, float)
    words = norm.split(",")
    if not set(words) <= {"no", "yes"}:
        raise UserError(f"--norm {norm}: write no, yes or no,yes")
    norms = tuple(word == "yes" for word in words)
    result = evaluate_sweep(
        model,
        labelled.config(model),
        SweepProtocol(tuple(rates), tuple(decays), norms, epochs, batch_size, seed),
        [frozen.readout(word) for word in layer.split(",")],
        **labelled.comparison(),
    )
    conclude(model, [result], as_json)


@evaluation.command(epilog="Example: sslkit eval finetune runs/photos --data flowers --labels 10% --protocol swav")
@shared
def finetune(
    model: Model,
    labelled: Labelled,
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
    scratch: Scratch = True,
    workers: Workers = 0,
    as_json: AsJson = False,
) -> None:
    """Train the whole encoder on all or a few of the labels, beside the same from random weights."""
    with quick_imports():
        from sslkit.evaluate import TransferOptions, evaluate_finetune

    given = {"epochs": epochs, "batch_size": batch_size, "base_lr": lr, "layer_decay": layer_decay, "seed": seed}
    neck = None
    if head_layers:
        from sslkit.engine.projector import first_projector_layers

        neck = first_projector_layers(Path(model), head_layers)
    result = evaluate_finetune(
        model,
        labelled.config(model),
        protocol,
        changes={name: value for name, value in given.items() if value},
        labels=labels,
        neck=neck,
        splits=labelled.splits(),
        options=TransferOptions(scratch, labelled.baseline or (), workers, say),
    )
    conclude(model, [result], as_json)


@evaluation.command(epilog="Example: sslkit eval compare runs/a runs/b")
def compare(
    models: Annotated[list[str], typer.Argument(help="Run folders, or files that hold what --json printed.")],
    protocol: Annotated[str, typer.Option(help="Only evaluations whose name starts so, such as knn.")] = "",
    as_json: AsJson = False,
) -> None:
    """Scores side by side, of the same protocol or not at all."""
    from sslkit.evaluate.compare_scores import comparable

    show_comparison(comparable({model: _judged(Path(model)) for model in models}, protocol), as_json)


def _judged(path: Path) -> "list[Row]":
    """Evaluations of a run folder, or of a file that holds a result."""
    from sslkit.files.jsonl_reader import rows_of

    check_path(path, "MODEL")
    if (path / "recipe.toml").is_file():
        rows = [row for row in rows_of(path / "results.jsonl") if row.get("by") == "eval"]
        return [row for row in rows if _is_score(row)]
    try:
        printed = json.loads(path.read_text(encoding="utf-8"))
        results = printed if isinstance(printed, list) else [printed]
        rows = [{**result, **result["scores"][0]} for result in results]
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
    scratch: Scratch = True,
    train_split: Annotated[str, typer.Option(help="Split to learn from. Default: trainval or train.")] = "",
    test_split: Annotated[str, typer.Option(help="Split to score on. Default: test, else val.")] = "",
    baseline: Baseline = None,
    background: Background = "",
    workers: Workers = 0,
    as_json: AsJson = False,
) -> None:
    """Train a Faster or Mask R-CNN over the encoder, beside the same from random weights; AP as COCO defines it."""
    with quick_imports():
        from sslkit.evaluate import Splits, TransferOptions
        from sslkit.evaluate.detection.detect import evaluate_detect
        from sslkit.evaluate.detection.detector_training import DetectProtocol

    own = DetectProtocol.from_name(protocol)
    own = own.at_short_side(short_side) if short_side else own
    own = override(own, steps=steps, batch_size=batch_size, base_lr=lr, regions=regions, seed=seed)
    result = evaluate_detect(
        model,
        data,
        own,
        arch=arch,
        masks=masks,
        splits=Splits(train_split, test_split),
        background=find_background(background, model),
        options=TransferOptions(scratch, baseline or (), workers, say),
    )
    conclude(model, [result], as_json)


@evaluation.command(epilog="Example: sslkit eval diagnose runs/quickstart --data builtin:fashion_mnist")
def diagnose(
    model: Model,
    data: Annotated[str, typer.Option("--data", help="Any images: folder, datasets id, or builtin:NAME.")],
    images: Annotated[int, typer.Option(min=2, help="At most so many, drawn by --seed.")] = 1000,
    views: Annotated[int, typer.Option(min=2, help="Random crops and mirrors of each.")] = 8,
    split: Annotated[str, typer.Option(help="Split to draw from.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Of the draw, the views and the random twin.")] = 0,
    layer: Layer = "out",
    data_name: Annotated[str, typer.Option(help="The data set's configuration, if it has several.")] = "",
    image_column: ImageColumn = "",
    background: Background = "",
    workers: Workers = 0,
    as_json: AsJson = False,
) -> None:
    """What features tell without labels: do they collapse, how many directions do they use, do views agree."""
    with quick_imports():
        from sslkit.evaluate.label_free.diagnose import diagnose_encoder

    config = data_config(data, data_name, image_column=image_column, background=find_background(background, model))
    source = config.model_copy(update={"split": split})
    readout = Frozen(cache=False, workers=workers).readout(layer)
    show_diagnosis(diagnose_encoder(model, source, readout, images=images, views=views, seed=seed), as_json)
