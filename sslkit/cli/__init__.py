"""The command line: parse, call, print. Heavy imports wait inside the commands, so that ``--help`` is quick.

Exit codes: 0 done, 2 bad input (one sentence), 1 a fault of ours, 75 stopped on request, to be continued.
"""

import itertools
import os
import signal
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Annotated, NoReturn

import typer

import sslkit
from sslkit.cli.bench_command import bench
from sslkit.cli.data_commands import data_app, prepare
from sslkit.cli.data_summary import data_lines
from sslkit.cli.eval_commands import evaluation
from sslkit.cli.import_command import import_
from sslkit.cli.launcher_exit import is_said_by_first, leave_for_launcher, wait_for_others
from sslkit.cli.options import Backbone, Images, MethodName, Overrides, RecipeName, recipe_from_words
from sslkit.cli.output import AsJson, console, show_report
from sslkit.cli.publish_command import publish
from sslkit.cli.replay_command import replay
from sslkit.cli.report_commands import report, views
from sslkit.cli.startup import quick_imports
from sslkit.cli.submit_command import submit
from sslkit.cli.watch_command import watch
from sslkit.errors import RunError, UserError, check_path
from sslkit.terminal import (
    PlainTable,
    guard_other_libraries,
    printed,
    say,
    sentences_of,
    show,
    show_text,
    show_traceback,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="The recipes that come with sslkit.", invoke_without_command=True)
app.add_typer(evaluation, name="eval")
app.add_typer(data_app, name="data")
app.add_typer(recipes_app, name="recipes")

BAD_INPUT = 2
RESUMABLE = 75  # sslkit.engine.resilience.preemption has it too, behind heavy imports
INTERRUPTED = 130  # what Typer makes of Ctrl-C


def _say_version(asked: bool) -> None:
    if asked:
        print(f"sslkit {sslkit.__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """Self-supervised pretraining of timm image encoders."""


@app.command(epilog="Example: sslkit pretrain mocov3_vits --set data.path=photos --output runs/photos")
def pretrain(
    recipe: RecipeName = "",
    overrides: Overrides = None,
    output: Annotated[str, typer.Option(help="Run folder. Default: runs/NAME of the recipe.")] = "",
    resume: Annotated[str, typer.Option(help="auto, never, or the path of a checkpoint or run.")] = "auto",
    method: MethodName = "",
    backbone: Backbone = "",
    data: Images = "",
) -> None:
    """Pretrain an encoder; the same command again continues it.

    Give a recipe, or all of --method, --backbone and --data. Given both, the options win. SIGTERM, SIGUSR1 and Ctrl-C
    save and end it with exit code 75; the second one ends it at once.
    """
    _exit_resumable_meanwhile()
    with quick_imports():
        from sslkit.engine import train

    loaded = recipe_from_words(recipe, overrides or [], method, backbone, data)
    name = Path(recipe).stem if recipe else f"{loaded.method_name}_{loaded.backbone.name}"
    if train(loaded, output or Path("runs") / name, resume).stopped:
        leave_for_launcher("sslkit: stopped on request and saved; the same command continues")
        raise typer.Exit(RESUMABLE)


def _exit_resumable_meanwhile() -> None:
    """Until the engine listens to signals itself there is nothing to save: end as a run that can go on."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda *_: os._exit(RESUMABLE))


@app.command(epilog="Example: sslkit export runs/quickstart my-encoder")
def export(
    run: Annotated[str, typer.Argument(help="Run folder.")],
    folder: Annotated[str, typer.Argument(help="New or empty folder to write.")],
    license_id: Annotated[str, typer.Option("--license", help="SPDX id of the weights' licence.")] = "apache-2.0",
    layout: Annotated[str, typer.Option("--format", help="timm, or detectron2 (ResNets only).")] = "timm",
) -> None:
    """Write the encoder as a folder that timm and transformers load, and prove that it does."""
    with quick_imports():
        from sslkit.publish import export_detectron2, export_encoder

    if layout not in ("timm", "detectron2"):
        raise UserError(f"--format: must be timm or detectron2, not {layout!r}")
    if layout == "detectron2":
        written = export_detectron2(run, folder)
        show(f"{written['file']}: {written['convolutions']} convolutions with their norms")
        show(f"{folder}/README.md has the configuration that goes with it")
        return
    proof = export_encoder(run, folder, license_id)
    show(f"{folder}: features {proof['features']} equal bit for bit after reloading")
    if proof["loads_in_timm"]:
        show(f'load it with timm.create_model("local-dir:{folder}", pretrained=True, num_classes=0)')
    else:
        show("its stem for small images is not one timm can build: load it with sslkit.evaluate.load_encoder")


app.command(epilog="Example: sslkit publish runs/quickstart --repo-id user/my-encoder")(publish)
app.command("import", epilog="Example: sslkit import moco_v2_800ep_pretrain.pth.tar moco-v2")(import_)
app.command(epilog="Example: sslkit report runs/quickstart")(report)
app.command(epilog="Example: sslkit watch runs/quickstart")(watch)
app.command(epilog="Example: sslkit views mocov3_vits --data photos")(views)
app.command(epilog="Example: sslkit prepare photos packed")(prepare)
app.command(epilog="Example: sslkit bench mocov3_vits --data photos")(bench)
app.command(epilog="Example: sslkit submit mocov3_vits --nodes 2 --gpus-per-node 8 --time 1-0")(submit)
app.command(epilog="Example: sslkit replay runs/photos/capsules/step-00012345")(replay)


@app.command(epilog="Example: sslkit doctor mocov3_vits --data photos")
def doctor(
    recipe: RecipeName = "",
    overrides: Overrides = None,
    method: MethodName = "",
    backbone: Backbone = "",
    data: Images = "",
    as_json: AsJson = False,
) -> None:
    """Check a recipe's wiring on its own data, and advise; without a recipe, say what this machine can do.

    Exit code 2 if there is a fault. Warnings are advice and leave it 0. Nothing is written to disk.
    """
    with quick_imports():
        from sslkit.doctor import Report, check_machine, check_recipe

    if recipe or overrides or method or backbone or data:
        loaded = recipe_from_words(recipe, overrides or [], method, backbone, data)
        examined = check_recipe(loaded, lambda stage: say(f"{stage} ..."))
    else:
        examined = Report(check_machine())
    if examined.findings:
        show_report(examined, as_json)
    if examined.of("fault"):
        raise typer.Exit(BAD_INPUT)


@app.command(epilog="Example: sslkit methods")
def methods() -> None:
    """List the methods."""
    from sslkit.methods import all_methods

    table = PlainTable("method", "paper")
    for name, method in sorted(all_methods().items()):
        doc = sys.modules[method.__module__].__doc__ or method.__doc__ or ""
        table.add_row(name, doc.strip().splitlines()[0])
    console.print(table)


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the recipes that come with sslkit."""
    if context.invoked_subcommand is not None:
        return
    from sslkit.recipe.resolve import shipped_recipes

    table = PlainTable("recipe", "what it is")
    for name, file in shipped_recipes().items():
        table.add_row(name, file.read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
    console.print(table)


@recipes_app.command("show", epilog="Example: sslkit recipes show mocov3_vits")
def show_recipe(
    name: Annotated[str, typer.Argument(help="Name or TOML file.")],
    overrides: Overrides = None,
) -> None:
    """Print a recipe fully resolved: every number, after its own comment on where they come from."""
    from sslkit.recipe.resolve import find_recipe, load_recipe

    recipe = load_recipe(name, overrides)
    lines = find_recipe(name).read_text(encoding="utf-8-sig").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    show_text("\n".join([*comment, "", recipe.to_toml()]))


def main(arguments: list[str] | None = None) -> None:
    """Run a command; bad input becomes one sentence and exit code 2."""
    guard_other_libraries()
    if threading.excepthook is threading.__excepthook__:  # a test runner has its own
        threading.excepthook = _print_thread_traceback
    try:
        for word in sys.argv[1:] if arguments is None else arguments:
            check_path(word, "command line", lines=True)  # of those that are paths, more is asked where they are read
        with data_lines(on_error_stream="--json" in (sys.argv if arguments is None else arguments)):
            code = app(arguments, standalone_mode=False)
    except UserError as error:
        _complain(sentences_of(error), BAD_INPUT)
    except RunError as error:
        _complain(sentences_of(error), code=1)
    except Exception as error:
        # Typer's usage errors: of click or of Typer's own copy of it, depending on its version.
        if not hasattr(error, "format_message"):
            leave_for_launcher(f"sslkit: {type(error).__name__}: {' '.join(sentences_of(error))}")
            sys.excepthook = _print_traceback  # Typer has set its own
            raise
        _complain([printed(error.format_message())], BAD_INPUT)
    else:
        if code == INTERRUPTED:
            say("stopped; the same command continues from what was saved, if anything was")
        sys.exit(code or 0)


def _print_traceback(_kind: type[BaseException], error: BaseException, _traceback: TracebackType | None) -> None:
    """A fault of ours, in full but for tokens, which addresses and headers bring along."""
    show_traceback(error)


def _print_thread_traceback(failed: threading.ExceptHookArgs) -> None:
    """The same of a thread."""
    if failed.exc_value is not None:
        show_traceback(failed.exc_value)


def _complain(sentences: list[str], code: int) -> NoReturn:
    """Say what is wrong and exit; of the processes of a launcher that have the same to say, the first one says it."""
    message = "\n".join(f"sslkit: {sentence}" for sentence in sentences if sentence)
    if message:
        leave_for_launcher(message)
        if not is_said_by_first(message):
            print(message, file=sys.stderr, flush=True)
        wait_for_others()
    sys.exit(code)
