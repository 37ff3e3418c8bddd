"""``sslkit eval``: evaluate an encoder, with or without labels."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslkit.cli.options import (
    Background,
    Baseline,
    DataName,
    ImageColumn,
    Labelled,
    Layer,
    Model,
    Probe,
    Workers,
    command,
    data_config,
    fast_imports,
    find_background,
    nonzero,
    parse_numbers,
)
from sslkit.cli.output import AsJson, print_and_store, print_comparison, print_diagnosis
from sslkit.errors import UserError, check_path
from sslkit.terminal import print_message

if TYPE_CHECKING:
    from sslkit.evaluate import TransferOptions
    from sslkit.evaluate.compare_scores import Row

eval_app = typer.Typer(
    help="Evaluate an encoder, with or without labels.",
    no_args_is_help=True,
    epilog="Example: sslkit eval knn runs/quickstart --data builtin:fashion_mnist",
)


@dataclasses.dataclass(frozen=True)
class KnnSettings:
    """Neighbours and their weights."""

    k: Annotated[str, "Number of neighbours, or several such as 10,20,200 at no extra cost."] = "20"
    temperature: Annotated[str, "Neighbours are weighted by exp(similarity / temperature); one number or several."] = (
        "0.07"
    )
    protocol: Annotated[str, "dino or instdisc: sets k and temperature."] = ""
    centre: Annotated[bool, typer.Option("--centre", help="Subtract the bank's mean first (in no paper).")] = False


@command(eval_app, "sslkit eval knn runs/quickstart --data builtin:fashion_mnist")
def knn(model: Model, probe: Probe, settings: KnnSettings, as_json: AsJson = False) -> None:
    """Weighted k-nearest neighbours on frozen features, compared with raw pixels and random initialisation."""
    with fast_imports():
        from sslkit.evaluate import KnnProtocol, evaluate_knn_grid

    neighbours = parse_numbers("--k", settings.k, int)
    temperatures = parse_numbers("--temperature", settings.temperature, float)
    grid = [KnnProtocol(k, temperature) for k, temperature in itertools.product(neighbours, temperatures)]
    chosen = KnnProtocol.from_name(settings.protocol) if settings.protocol else grid
    protocols = [dataclasses.replace(each, centre=settings.centre) for each in chosen]
    results = evaluate_knn_grid(model, probe.config(model), protocols, probe.readout(), **probe.comparison(model))
    print_and_store(model, results, as_json)


@command(eval_app, "sslkit eval linear runs/quickstart --data builtin:fashion_mnist")
def linear(
    model: Model,
    probe: Probe,
    protocol: Annotated[str, "logistic, moco_v1 (for v1 and v2), moco_v3, simclr, byol, swav or dino."] = "logistic",
    augment: Annotated[bool, "Random crops and flips in the SGD protocols, as in the papers."] = True,
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of the SGD protocols; 0: as in the paper.")] = 0,
    as_json: AsJson = False,
) -> None:
    """A linear classifier on frozen features, compared with raw pixels and random initialisation."""
    with fast_imports():
        from sslkit.evaluate import evaluate_linear

    options = {"augment": augment, "epochs": epochs, **probe.comparison(model)}
    result = evaluate_linear(model, probe.config(model), protocol, probe.readout(), **options)
    print_and_store(model, [result], as_json)


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """The heads of a sweep and their training."""

    lr: Annotated[str, "Learning rates at batch size 256."] = "0.003,0.01,0.03,0.1,0.3,1,3,10"
    weight_decay: Annotated[str, "Weight decays."] = "0,1e-5"
    norm: Annotated[str, "BatchNorm without parameters before each head: no, yes or no,yes."] = "no,yes"
    epochs: Annotated[int, typer.Option(min=1, help="Epochs over the features.")] = 50
    batch_size: Annotated[int, typer.Option(min=2, help="Batch size.")] = 256
    seed: Annotated[int, "Random seed of the held-out images, initialisation and order."] = 0


@command(eval_app, "sslkit eval sweep runs/photos --data flowers --layer out,-2")
def sweep(model: Model, probe: Probe, settings: SweepSettings, as_json: AsJson = False) -> None:
    """Train many linear heads on frozen features at once; the best on held-out images is tested."""
    with fast_imports():
        from sslkit.evaluate.probes.scoring import evaluate_sweep
        from sslkit.evaluate.probes.sweep import SweepProtocol

    rates = tuple(parse_numbers("--lr", settings.lr, float))
    decays = tuple(parse_numbers("--weight-decay", settings.weight_decay, float))
    norms = tuple(choice == "yes" for choice in settings.norm.split(","))
    if not set(settings.norm.split(",")) <= {"no", "yes"}:
        raise UserError(f"--norm {settings.norm}: must be no, yes or no,yes")
    protocol = SweepProtocol(rates, decays, norms, settings.epochs, settings.batch_size, settings.seed)
    readouts = [probe.readout(layer) for layer in probe.layer.split(",")]
    result = evaluate_sweep(model, probe.config(model), protocol, readouts, **probe.comparison(model))
    print_and_store(model, [result], as_json)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """How encoders are trained further."""

    scratch: Annotated[bool, "Also train the architecture from random weights."] = True
    workers: Workers = 0

    def options(self, baseline: list[str] | None) -> "TransferOptions":
        """The options of an evaluation that trains the encoder."""
        from sslkit.evaluate import TransferOptions

        return TransferOptions(self.scratch, baseline or (), self.workers, print_message)


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """The protocol and what differs from it."""

    protocol: Annotated[str, "deit, moco_v3 (transfer), simclr or swav (few labels)."] = "deit"
    epochs: Annotated[int, typer.Option(min=0, help="0: as in the protocol.")] = 0
    batch_size: Annotated[int, typer.Option(min=0, help="0: as in the protocol.")] = 0
    base_lr: Annotated[float, typer.Option("--lr", min=0, help="Base learning rate; 0: as in the protocol.")] = 0.0
    layer_decay: Annotated[
        float, typer.Option(min=0.1, max=1, help="Ratio of learning rates of successive blocks.")
    ] = 1.0
    seed: Annotated[int, "Random seed of the choice of labels and of training."] = 0


@command(eval_app, "sslkit eval finetune runs/photos --data flowers --labels 10% --protocol swav")
def finetune(
    model: Model,
    labelled: Labelled,
    settings: FinetuneSettings,
    transfer: Transfer,
    labels: Annotated[str, "all, 10%, 5-shot, or a file with one image name per line."] = "all",
    head_layers: Annotated[int, typer.Option(min=0, help="Layers of the projector to keep; SimCLR v2: 1.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Fine-tune the encoder on all or a few of the labels, compared with training from random weights."""
    with fast_imports():
        from sslkit.evaluate import evaluate_finetune

    neck = None
    if head_layers:
        from sslkit.engine.projector import first_projector_layers

        neck = first_projector_layers(Path(model), head_layers)
    result = evaluate_finetune(
        model,
        labelled.config(model),
        settings.protocol,
        changes=nonzero(settings, "epochs", "batch_size", "base_lr", "layer_decay", "seed"),
        labels=labels,
        neck=neck,
        splits=labelled.splits(),
        options=transfer.options(labelled.baseline),
    )
    print_and_store(model, [result], as_json)


@command(eval_app, "sslkit eval compare runs/a runs/b")
def compare(
    models: Annotated[list[str], typer.Argument(help="Run folders, or files with the output of --json.")],
    protocol: Annotated[str, "Only evaluations whose name starts with this, such as knn."] = "",
    as_json: AsJson = False,
) -> None:
    """Compare the scores of several encoders. Only scores of the same protocol are compared."""
    from sslkit.evaluate.compare_scores import comparable

    print_comparison(comparable({model: _scores_of(Path(model)) for model in models}, protocol), as_json)


def _scores_of(path: Path) -> "list[Row]":
    """Scores in a run folder, or in a file with the output of --json."""
    from sslkit.files.run_reader import RunReader

    check_path(path, "MODEL")
    run = RunReader(path)
    if run.is_run:
        return [row for row in run.rows("results") if row.get("by") == "eval" and _is_score(row)]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results = content if isinstance(content, list) else [content]
        rows = [{**result, **result["scores"][0]} for result in results]
        if not all(map(_is_score, rows)):
            raise ValueError("not scores")
        return rows
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(f"{path}: neither a run folder nor a file with the output of eval --json") from error


def _is_score(row: "Row") -> bool:
    """Whether a row has the keys that a comparison shows, of the right types."""
    kinds = {"evaluation": str, "protocol": dict, "protocol_hash": str, "accuracy": int | float}
    ends = row.get("interval") or [0.0, 0.0]
    is_pair = isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
    return is_pair and all(isinstance(row.get(key), kind) for key, kind in kinds.items())


@dataclasses.dataclass(frozen=True)
class DetectSettings:
    """The protocol and what differs from it."""

    protocol: Annotated[str, "voc or coco, with the settings of MoCo."] = "voc"
    steps: Annotated[int, typer.Option(min=0, help="Training steps; 0: as in the protocol.")] = 0
    batch_size: Annotated[int, typer.Option(min=0, help="Batch size; 0: as in the protocol.")] = 0
    base_lr: Annotated[float, typer.Option("--lr", min=0, help="Learning rate for 16 images; 0: the protocol's.")] = 0.0
    short_side: Annotated[int, typer.Option(min=0, help="Shorter side in the test, in pixels; 0: as in protocol.")] = 0
    regions: Annotated[int, typer.Option(min=0, help="Regions per image to train on; 0: as in the protocol (512).")] = 0
    seed: Annotated[int, "Random seed of new layers, order and augmentation."] = 0


@dataclasses.dataclass(frozen=True)
class DetectionImages:
    """Images with boxes, and baselines to compare with."""

    data: Annotated[str, typer.Option("--data", help="Folder in VOC or COCO format.")]
    train_split: Annotated[str, "Split to train on. Default: trainval or train."] = ""
    test_split: Annotated[str, "Split to test on. Default: test, else val."] = ""
    baseline: Baseline = None
    background: Background = ""


@command(eval_app, "sslkit eval detect runs/photos --data VOCdevkit --batch-size 4 --steps 6000")
def detect(
    model: Model,
    images: DetectionImages,
    settings: DetectSettings,
    transfer: Transfer,
    arch: Annotated[str, "c4 (only ResNets) or fpn. Default: c4 for ResNets, else fpn."] = "",
    masks: Annotated[bool, typer.Option("--masks", help="Mask R-CNN: predict and evaluate masks too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a Faster or Mask R-CNN on the encoder, compared with random weights. Reports AP as defined by COCO."""
    with fast_imports():
        from sslkit.evaluate import Splits
        from sslkit.evaluate.detection.detect import evaluate_detect
        from sslkit.evaluate.detection.detector_training import DetectProtocol

    protocol = DetectProtocol.from_name(settings.protocol)
    protocol = protocol.at_short_side(settings.short_side) if settings.short_side else protocol
    result = evaluate_detect(
        model,
        images.data,
        dataclasses.replace(protocol, **nonzero(settings, "steps", "batch_size", "base_lr", "regions", "seed")),
        arch=arch,
        masks=masks,
        splits=Splits(images.train_split, images.test_split),
        background=find_background(images.background, model),
        options=transfer.options(images.baseline),
    )
    print_and_store(model, [result], as_json)


@dataclasses.dataclass(frozen=True)
class UnlabelledImages:
    """Images without labels, and which of them are used."""

    data: Annotated[str, typer.Option("--data", help="Images: folder, datasets id, or builtin:NAME.")]
    images: Annotated[int, typer.Option(min=2, help="Maximum number of images; chosen at random by --seed.")] = 1000
    views: Annotated[int, typer.Option(min=2, help="Random crops and flips of each image.")] = 8
    split: Annotated[str, "Split of the images."] = "train"
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the images, the views and the random encoder.")] = 0
    data_name: DataName = ""
    image_column: ImageColumn = ""
    background: Background = ""


@command(eval_app, "sslkit eval diagnose runs/quickstart --data builtin:fashion_mnist")
def diagnose(
    model: Model, sample: UnlabelledImages, layer: Layer = "out", workers: Workers = 0, as_json: AsJson = False
) -> None:
    """Measure features without labels: collapse, number of directions used, and agreement between views."""
    with fast_imports():
        from sslkit.evaluate.features.readouts import Readout
        from sslkit.evaluate.label_free.diagnose import diagnose_encoder

    config = data_config(sample.data, sample.data_name, "", sample.image_column, sample.background, model)
    config = config.model_copy(update={"split": sample.split})
    readout = dataclasses.replace(Readout.from_name(layer), workers=workers)
    counts = {"images": sample.images, "views": sample.views, "seed": sample.seed}
    print_diagnosis(diagnose_encoder(model, config, readout, **counts), as_json)
