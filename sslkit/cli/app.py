"""The command-line application: its commands, and how errors are reported.

Exit codes: 0 success; 1 internal error, or a run that cannot continue; 2 bad input, reported in one sentence; 75 run
stopped on request, the same command continues it.
"""

import re
import sys
import threading
from typing import Annotated, NoReturn

import typer

import sslkit
from sslkit.cli.adapt_commands import adapt
from sslkit.cli.check_commands import bench, doctor
from sslkit.cli.completion import prepare_completion
from sslkit.cli.data_commands import data_app, prepare
from sslkit.cli.encoder_commands import export, import_, publish
from sslkit.cli.eval_commands import eval_app
from sslkit.cli.launcher_exit import (
    exit_without_finalization,
    is_printed_by_first,
    leave_for_launcher,
    wait_for_others,
)
from sslkit.cli.list_commands import methods, recipes_app
from sslkit.cli.options import command
from sslkit.cli.output import print_data_messages
from sslkit.cli.report_commands import report, views, watch
from sslkit.cli.run_commands import pretrain, replay, submit
from sslkit.command_line import running
from sslkit.errors import RunError, UserError, check_path, first_line, is_out_of_memory
from sslkit.exit_codes import BAD_INPUT, INTERRUPTED
from sslkit.progress import show_stages
from sslkit.terminal import error_messages, print_message, print_traceback, sanitize, sanitize_other_libraries

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
for function, example in (
    (pretrain, "sslkit pretrain --data photos --hours 2"),
    (adapt, "sslkit adapt resnet50.a1_in1k --data photos --labelled sorted-photos"),
    (submit, "sslkit submit mocov3_vits --nodes 2 --gpus-per-node 8 --time 1-0"),
    (replay, "sslkit replay runs/photos/capsules/step-00012345"),
    (export, "sslkit export runs/quickstart my-encoder"),
    (publish, "sslkit publish runs/quickstart --repo-id user/my-encoder"),
    (import_, "sslkit import moco_v2_800ep_pretrain.pth.tar moco-v2"),
    (report, "sslkit report runs/quickstart"),
    (watch, "sslkit watch runs/quickstart"),
    (views, "sslkit views mocov3_vits --data photos"),
    (prepare, "sslkit prepare photos packed"),
    (doctor, "sslkit doctor --data photos"),
    (bench, "sslkit bench mocov3_vits --data photos"),
    (methods, "sslkit methods"),
):
    command(app, example, function.__name__.removesuffix("_"))(function)
app.add_typer(eval_app, name="eval")
app.add_typer(data_app, name="data")
app.add_typer(recipes_app, name="recipes")


def _print_version(requested: bool) -> None:
    if requested:
        print(f"sslkit {sslkit.__version__}")
        raise typer.Exit


@app.callback(epilog="Example: sslkit pretrain quickstart, then sslkit report runs/quickstart")
def sslkit_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Self-supervised pretraining of timm image encoders."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command, by default that of this process, and exit. Bad input is reported in one sentence."""
    if arguments is not None:
        return _run_command(arguments)
    try:
        _run_command(sys.argv[1:])
    except SystemExit as leaving:
        exit_without_finalization(leaving.code)
        raise


def _run_command(arguments: list[str]) -> None:
    """Run a command and raise SystemExit with its exit code."""
    sanitize_other_libraries()
    if threading.excepthook is threading.__excepthook__:  # a test runner has its own
        threading.excepthook = lambda failed: print_traceback(failed.exc_value or failed.exc_type())
    prepare_completion()
    try:
        for argument in arguments:
            check_path(argument, "command line", lines=True)
        with print_data_messages(to_stderr="--json" in arguments), show_stages(), running(arguments):
            code = app(arguments, standalone_mode=False, prog_name="sslkit")
    except UserError as error:
        _fail(error_messages(error), BAD_INPUT)
    except RunError as error:
        _fail(error_messages(error), code=1)
    except Exception as error:
        if is_out_of_memory(error):
            _fail([_memory_advice(arguments, error)], BAD_INPUT)
        # Usage errors are of click or of Typer's own copy of it, depending on its version.
        if not hasattr(error, "format_message"):
            leave_for_launcher(f"sslkit: {type(error).__name__}: {' '.join(error_messages(error))}")
            sys.excepthook = lambda _kind, error, _traceback: print_traceback(error)  # Typer has set its own
            raise
        _fail([sanitize(error.format_message()) + _usage_hint(error.format_message())], BAD_INPUT)
    else:
        if code == INTERRUPTED:
            print_message("interrupted; the same command continues from the last checkpoint, if there is one")
        sys.exit(code or 0)


def _memory_advice(arguments: list[str], error: BaseException) -> str:
    """What to do about a lack of memory in a command that has no advice of its own, such as an evaluation."""
    has_batches = {"finetune", "detect", "sweep"} & set(arguments[:2])
    advice = "give a smaller --batch-size" if has_batches else "give fewer or smaller images"
    if "CUDA" in str(error):
        advice += ", end other programs on this GPU (nvidia-smi shows them), or run on the CPU: CUDA_VISIBLE_DEVICES= "
        advice += " ".join(["sslkit", *arguments[:2], "..."])
    return f"out of memory ({sanitize(first_line(error, 160))}); {advice}"


def _usage_hint(problem: str) -> str:
    """How to write a recipe's key that was given as an option or an argument; empty if it was none."""
    from sslkit.recipe.schema import TABLES

    if (found := re.search(r"No such option: --([\w-]+)", problem)) is not None:
        key = found[1].replace("-", "_")
        tables = [table for table, model in TABLES.items() if key in model.model_fields and key != "device"]
        return f"; write --set {tables[0]}.{key}=VALUE" if len(tables) == 1 else ""
    found = re.search(r"extra argument\S* \(([\w.]+\.\w+=[^ ]*)", problem)
    return f"; write --set {found[1].rstrip(')')}" if found else ""


def _fail(messages: list[str], code: int) -> NoReturn:
    """Print messages and exit. If several processes of a launcher have the same messages, the first prints them."""
    text = "\n".join(f"sslkit: {message}" for message in messages if message)
    if text:
        leave_for_launcher(text)
        if not is_printed_by_first(text):
            print(text, file=sys.stderr, flush=True)
        wait_for_others()
    sys.exit(code)
