"""The command line: parse, call, print. Heavy imports wait inside the commands, so that ``--help`` is quick.

Exit codes: 0 done, 2 bad input (one sentence), 1 a fault of ours.
"""

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sslkit.errors import RunError, UserError

if TYPE_CHECKING:
    from sslkit.data.source import DataConfig
    from sslkit.doctor import Report
    from sslkit.evaluate.judge import Judgement, Reading
    from sslkit.recipe import Recipe

app = typer.Typer(
    help="Self-supervised pretraining of timm image encoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
evaluation = typer.Typer(help="Judge an encoder on labelled images.", no_args_is_help=True)
recipes_app = typer.Typer(help="The recipes that come with sslkit.", invoke_without_command=True)
app.add_typer(evaluation, name="eval")
app.add_typer(recipes_app, name="recipes")

console = Console()

BAD_INPUT = 2
INTERRUPTED = 130  # what Typer makes of Ctrl-C

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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command(epilog="Example: sslkit pretrain mocov3_vits --set data.path=photos --output runs/photos")
def pretrain(
    recipe: Annotated[str, typer.Argument(help="TOML file, or the name of a shipped recipe.")] = "",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="table.key=value; may repeat.")] = None,
    output: Annotated[str, typer.Option(help="Run folder. Default: runs/NAME of the recipe.")] = "",
    resume: Annotated[str, typer.Option(help="auto, never, or the path of a checkpoint or run.")] = "auto",
    method: Annotated[str, typer.Option(help="Method, such as moco_v2.")] = "",
    backbone: Annotated[str, typer.Option(help="timm name, such as resnet18.")] = "",
    data: Annotated[str, typer.Option(help="Folder of images or datasets id.")] = "",
) -> None:
    """Pretrain an encoder; the same command again continues it.

    Give a recipe, or all of --method, --backbone and --data. Given both, the options win.
    """
    from sslkit.engine import train

    loaded = _recipe_from_words(recipe, overrides or [], method, backbone, data)
    name = Path(recipe).stem if recipe else f"{loaded.method_name}_{loaded.backbone.name}"
    train(loaded, output or Path("runs") / name, resume)


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
    _conclude(model, judgement, as_json)


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
    _conclude(model, judgement, as_json)


@app.command(epilog="Example: sslkit export runs/quickstart my-encoder")
def export(
    run: Annotated[str, typer.Argument(help="Run folder.")],
    folder: Annotated[str, typer.Argument(help="New or empty folder to write.")],
    license_id: Annotated[str, typer.Option("--license", help="SPDX id of the weights' licence.")] = "apache-2.0",
) -> None:
    """Write the encoder as a folder that timm and transformers load, and prove that it does."""
    from sslkit.publish import export_encoder

    proof = export_encoder(run, folder, license_id)
    console.print(f"{folder}: features {proof['features']} equal bit for bit after reloading", highlight=False)
    if proof["loads_in_timm"]:
        console.print(
            f'load it with timm.create_model("local-dir:{folder}", pretrained=True, num_classes=0)', highlight=False
        )
    else:
        console.print(
            "its stem for small images is not one timm can build: load it with sslkit.evaluate.load_encoder",
            highlight=False,
        )


@app.command(epilog="Example: sslkit report runs/quickstart")
def report(run: Annotated[str, typer.Argument(help="Run folder.")]) -> None:
    """Draw a run: its curves and the views it learned from, as PNG pictures."""
    from sslkit.report import draw_run

    for picture in draw_run(Path(run)):
        console.print(str(picture), highlight=False)


@app.command(epilog="Example: sslkit doctor mocov3_vits --data photos")
def doctor(
    recipe: Annotated[str, typer.Argument(help="TOML file, or the name of a shipped recipe.")] = "",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="table.key=value; may repeat.")] = None,
    method: Annotated[str, typer.Option(help="Method, such as moco_v2.")] = "",
    backbone: Annotated[str, typer.Option(help="timm name, such as resnet18.")] = "",
    data: Annotated[str, typer.Option(help="Folder of images or datasets id.")] = "",
    as_json: AsJson = False,
) -> None:
    """Check a recipe's wiring on its own data, and advise; without a recipe, say what this machine can do.

    Exit code 2 if there is a fault. Warnings are advice and leave it 0. Nothing is written to disk.
    """
    from sslkit.doctor import Report, examine, examine_machine

    if recipe or overrides or method or backbone or data:
        loaded = _recipe_from_words(recipe, overrides or [], method, backbone, data)
        examined = examine(loaded, lambda stage: print(f"sslkit: {stage} ...", file=sys.stderr))
    else:
        examined = Report(examine_machine())
    if examined.findings:
        _show_report(examined, as_json)
    if examined.of("fault"):
        raise typer.Exit(BAD_INPUT)


@app.command(epilog="Example: sslkit methods")
def methods() -> None:
    """List the methods."""
    from sslkit.methods import all_methods

    table = Table("method", "paper")
    for name, method in sorted(all_methods().items()):
        doc = sys.modules[method.__module__].__doc__ or method.__doc__ or ""
        table.add_row(name, doc.strip().splitlines()[0])
    console.print(table)


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the recipes that come with sslkit."""
    if context.invoked_subcommand is not None:
        return
    from sslkit.recipe import shipped_recipes

    table = Table("recipe", "what it is")
    for name, file in shipped_recipes().items():
        table.add_row(name, file.read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
    console.print(table)


@recipes_app.command(epilog="Example: sslkit recipes show mocov3_vits")
def show(
    name: Annotated[str, typer.Argument(help="Name or TOML file.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="table.key=value; may repeat.")] = None,
) -> None:
    """Print a recipe fully resolved: every number, after its own comment on where they come from."""
    from sslkit.recipe import find_recipe, load_recipe

    recipe = load_recipe(name, overrides)
    lines = find_recipe(name).read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    print("\n".join([*comment, "", recipe.to_toml()]))


def main(arguments: list[str] | None = None) -> None:
    """Run a command; bad input becomes one sentence and exit code 2."""
    try:
        code = app(arguments, standalone_mode=False)
    except UserError as error:
        _complain(str(error))
    except RunError as error:
        _complain(str(error), code=1)
    except Exception as error:
        # Typer's usage errors: of click or of Typer's own copy of it, depending on its version.
        if not hasattr(error, "format_message"):
            raise
        _complain(error.format_message())
    else:
        if code == INTERRUPTED:
            print("sslkit: stopped; the same command continues from the last checkpoint, if any", file=sys.stderr)
        sys.exit(code or 0)


def _complain(sentence: str, code: int = 2) -> NoReturn:
    if sentence:
        print(f"sslkit: {sentence}", file=sys.stderr)
    sys.exit(code)


def _recipe_from_words(recipe: str, overrides: list[str], method: str, backbone: str, data: str) -> "Recipe":
    from sslkit.recipe import build_recipe, load_recipe

    if recipe:
        given = {"method.name": method, "backbone.name": backbone, "data.path": data}
        return load_recipe(recipe, [f"{key}={json.dumps(word)}" for key, word in given.items() if word] + overrides)
    if not (method and backbone and data):
        raise UserError("give a recipe, or all of --method, --backbone and --data")
    tables = {"method": {"name": method}, "backbone": {"name": backbone}, "data": {"path": data}}
    return build_recipe(tables, overrides, name="command line")


def _data(path: str, name: str, label_column: str) -> "DataConfig":
    from sslkit.data.source import DataConfig

    if not path:
        raise UserError("--data: name a folder, a datasets id or builtin:fashion_mnist")
    return DataConfig(path=path, name=name or None, label_column=label_column or None)


def _reading(layer: int | None, crop_pct: float, workers: int) -> "Reading":
    from sslkit.evaluate.judge import Reading

    return Reading(layer, crop_pct, workers)


def _show_report(report: "Report", as_json: bool) -> None:
    """Print an examination: what applies as a table, the worst first; all of it, in its own order, as JSON."""
    counts = {verdict: len(report.of(verdict)) for verdict in ("fault", "warning", "ok")}
    if as_json:
        print(json.dumps({**counts, "findings": [dataclasses.asdict(finding) for finding in report.findings]}))
        return
    colours = {"fault": "bold red", "warning": "yellow", "ok": "green"}
    table = Table("check", "verdict", "what was seen")
    for finding in [*report.of("fault"), *report.of("warning"), *report.of("ok")]:
        table.add_row(finding.check, Text(finding.verdict, colours[finding.verdict]), Text(finding.sentence))
    console.print(table)
    absent = [finding.check for finding in report.of("not applicable")]
    console.print("not applicable here: " + (", ".join(absent) or "none"), highlight=False)
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), highlight=False)


def _conclude(model: str, judgement: "Judgement", as_json: bool) -> None:
    """Print a judgement and, if the model is a run, add it to the run's results."""
    from sslkit.engine.journal import append_result

    fields: dict[str, Any] = dataclasses.asdict(judgement)
    if (Path(model) / "recipe.toml").is_file() and (Path(model) / "encoder").is_dir():
        own = judgement.scores[0]
        row = {"by": "eval", "evaluation": judgement.evaluation, "data": judgement.data, "accuracy": own.accuracy}
        latest = (Path(model) / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
        step = int(latest.removeprefix("step-"))
        append_result(Path(model), {"step": step, **row, "protocol": judgement.protocol, "scores": fields["scores"]})
    if as_json:
        print(json.dumps(fields))
        return
    console.print(f"{judgement.evaluation}, {judgement.data}", highlight=False, markup=False)
    with_notes = any(score.note for score in judgement.scores)
    table = Table("encoder", "top-1 accuracy", *(["chosen"] if with_notes else []))
    for score in judgement.scores:
        table.add_row(score.encoder, f"{score.accuracy:.2%}", *([score.note] if with_notes else []))
    console.print(table)
