"""``sslkit pretrain``, ``submit`` and ``replay``: train here, train on a cluster, and compute a failed step again."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslkit.cli.launcher_exit import leave_for_launcher
from sslkit.cli.options import Overrides, RecipeName, RecipeOptions, expand_options
from sslkit.cli.output import AsJson, console
from sslkit.cli.startup import fast_imports
from sslkit.errors import UserError
from sslkit.terminal import PlainTable, print_json, print_line, print_text
from sslkit.text import pluralize

if TYPE_CHECKING:
    from sslkit.cluster.submission import Resources
    from sslkit.engine.replay import Replay

RESUMABLE = 75  # exit code of a run that was stopped and can be continued: EX_TEMPFAIL of sysexits.h
MAX_LISTED = 8


@expand_options
def pretrain(
    recipe: RecipeOptions,
    output: Annotated[str, typer.Option(help="Run folder. Default: runs/NAME of the recipe.")] = "",
    resume: Annotated[str, typer.Option(help="auto, never, or the path of a checkpoint or run.")] = "auto",
) -> None:
    """Pretrain an encoder. The same command continues an interrupted run.

    Give a recipe, or all of --method, --backbone and --data, or a recipe and options that override it. SIGTERM, SIGUSR1
    and Ctrl-C save a checkpoint and exit with code 75; a second signal exits at once.
    """
    _exit_as_resumable_on_signals()
    with fast_imports():
        from sslkit.engine import train

    loaded = recipe.load()
    if train(loaded, output or Path("runs") / recipe.name(loaded), resume).stopped:
        leave_for_launcher("sslkit: stopped on request, checkpoint saved; the same command continues the run")
        raise typer.Exit(RESUMABLE)


def _exit_as_resumable_on_signals() -> None:
    """Exit with code 75 on SIGTERM and SIGUSR1 until the engine handles them: there is nothing to save yet."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda *_: os._exit(RESUMABLE))


@dataclasses.dataclass(frozen=True)
class JobOptions:
    """Resources of a job on a cluster."""

    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs per node; one process per GPU.")] = 0
    tasks_per_node: Annotated[
        int, typer.Option(min=0, help="Processes per node. Default: one per GPU, or one without GPUs.")
    ] = 0
    time: Annotated[str, typer.Option(help="Time limit of each job: minutes, HH:MM:SS, D-HH or D-HH:MM.")] = "60"
    mem: Annotated[str, typer.Option(help="Memory per node, such as 64G.")] = ""
    cpus_per_task: Annotated[int, typer.Option(min=0, help="CPU cores per process, including its workers.")] = 0
    partition: Annotated[str, typer.Option(help="Slurm partition.")] = ""
    account: Annotated[str, typer.Option(help="Slurm account.")] = ""
    constraint: Annotated[str, typer.Option(help="Required node features.")] = ""
    sbatch: Annotated[
        list[str] | None, typer.Option(help="Another sbatch option, such as qos=high or exclusive; repeatable.")
    ] = None
    setup: Annotated[list[str] | None, typer.Option(help="Shell command to run before training; repeatable.")] = None
    signal_seconds: Annotated[
        int, typer.Option(min=10, help="Seconds before the time limit at which a checkpoint is saved.")
    ] = 120
    retries: Annotated[
        int, typer.Option(min=1, help="Give up after this many jobs in a row without a new checkpoint.")
    ] = 3

    def resources(self) -> "Resources":
        """The same for `sslkit.cluster`."""
        from sslkit.cluster.submission import Resources

        options = {**vars(self), "sbatch": _sbatch_options(self.sbatch or []), "setup": self.setup or []}
        return Resources(**options)


@expand_options
def submit(
    recipe: RecipeName,
    job: JobOptions,
    overrides: Overrides = None,
    output: Annotated[
        str, typer.Option(help="Run folder, on a file system that all nodes share. Default: runs/NAME of the recipe.")
    ] = "",
    cluster: Annotated[str, typer.Option(help="slurm, or local: processes on this machine.")] = "slurm",
    dry_run: Annotated[bool, typer.Option(help="Print the sbatch file; submit nothing.")] = False,
) -> None:
    """Submit a run to Slurm, with one process per GPU. The job is queued again at its time limit until the run is done.

    The same command continues a run whose job has ended. Needs submitit: pip install submitit.
    """
    from sslkit.cluster.submission import batch_file
    from sslkit.cluster.submission import submit as submit_run
    from sslkit.recipe.resolve import load_recipe

    loaded, resources = load_recipe(recipe, overrides), job.resources()
    folder = Path(output) if output else Path("runs") / Path(recipe).stem
    if dry_run:
        if cluster != "slurm":
            raise UserError(f"--dry-run: prints an sbatch file, which --cluster {cluster} does not use; remove one")
        print_text(batch_file(loaded, folder, resources))
        return
    submitted = submit_run(loaded, folder, resources, cluster)
    cancel = f"scancel {submitted.job_id}" if cluster == "slurm" else f"kill {submitted.job_id}"
    processes = pluralize(resources.processes, "process", "processes")
    print_line(f"job {submitted.job_id}: {processes}, run folder {folder}")
    print_line(f"log {submitted.log}; {cancel} stops it, and the same command continues it")


def _sbatch_options(options: list[str]) -> dict[str, str | bool]:
    """Parse ``name=value``, or a name alone, with or without leading dashes."""
    parsed: dict[str, str | bool] = {}
    for option in options:
        name, equals, value = option.lstrip("-").partition("=")
        if not name or (equals and not value):
            raise UserError(f"--sbatch {option}: must be name=value, such as qos=high, or a name, such as exclusive")
        parsed[name] = value if equals else True
    return parsed


def replay(
    capsule: Annotated[str, typer.Argument(help="A folder in capsules/ of the run folder.")],
    as_json: AsJson = False,
) -> None:
    """Compute a step that was skipped because of non-finite numbers again, on the CPU, and find where they start.

    Needs the images of the run at their original path. Changes nothing.
    """
    with fast_imports():
        from sslkit.engine.replay import replay_step

    found = replay_step(capsule)
    if as_json:
        print_json(_as_json(found))
        return
    print_line(f"step {found.step}: {found.complaint}")
    table = PlainTable("", "then", "now")
    for name, value in found.then.items():
        table.add_row(name.replace("_", " "), f"{value:.9g}", f"{found.now[name]:.9g}")
    console.print(table)
    print_line("the numbers are equal bit for bit" if found.same else "the numbers are not equal bit for bit")
    for remark in found.remarks:
        print_line(f"note: {remark}")
    if found.culprit:
        print_line(f"first output that is not finite: {found.culprit}")
    if found.bad_samples:
        print_line(f"it is not finite for the images at positions {_first(found.bad_samples)} of the data")
    if found.bad_gradients:
        count = pluralize(len(found.bad_gradients), "gradient")
        print_line(f"{count} not finite: {_first(found.bad_gradients)}")


def _as_json(found: "Replay") -> dict[str, object]:
    """JSON cannot hold NaN and infinity: the numbers become strings."""
    fields = dataclasses.asdict(found)
    for when in ("then", "now"):
        fields[when] = {name: repr(value) for name, value in fields[when].items()}
    return {**fields, "same": found.same}


def _first(items: "list[int] | list[str]") -> str:
    more = len(items) - MAX_LISTED
    return ", ".join(map(str, items[:MAX_LISTED])) + (f" and {more} more" if more > 0 else "")
