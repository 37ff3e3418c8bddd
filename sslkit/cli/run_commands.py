"""``sslkit pretrain``, ``submit`` and ``replay``: train here, train on a cluster, and compute a failed step again."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslkit.cli.launcher_exit import leave_for_launcher
from sslkit.cli.options import Overrides, RecipeName, RecipeOptions, fast_imports
from sslkit.cli.output import AsJson, console
from sslkit.cluster.submission import Resources, batch_file
from sslkit.cluster.submission import submit as submit_run
from sslkit.errors import UserError
from sslkit.exit_codes import RESUMABLE
from sslkit.terminal import PlainTable, print_json, print_line, print_text
from sslkit.text import join, pluralize

if TYPE_CHECKING:
    from sslkit.recipe.resolve import Recipe

MAX_LISTED = 8


def pretrain(
    recipe: RecipeOptions,
    output: Annotated[str, "Run folder. Default: runs/NAME of the recipe, or of the images of a plan."] = "",
    resume: Annotated[str, "auto, never, or the path of a checkpoint or run."] = "auto",
    hours: Annotated[
        float | None, typer.Option(min=0.01, max=10_000, help="Without a recipe: time for a new run. Default: 1.")
    ] = None,
) -> None:
    """Pretrain an encoder. The same command continues an interrupted run.

    Give a recipe and options that override it; or only --data, for a plan that fits these images and this machine. Its
    values and their reasons are shown before the run; what --method, --backbone and --set state is never changed.
    SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and exit with code 75; a second signal exits at once.
    """
    _exit_as_resumable_on_signals()
    with fast_imports():
        from sslkit.doctor.recipe_advice import advise_at_start
        from sslkit.engine import train

    if recipe.recipe and hours is not None:
        raise UserError(f"--hours: {recipe.recipe} says how long to train: leave --hours out, or --set train.epochs=N")
    stated = [each.partition("=")[0].strip() for each in recipe.stated()]
    if resume not in ("auto", "never") and not (recipe.recipe or output or "data.path" in stated):
        raise UserError(f"--resume {resume}: give the folder of the new run too, such as --output runs/longer")
    folder = Path(output or Path("runs") / recipe.name())
    loaded = recipe.load() if recipe.recipe else _plan(recipe, hours, folder, resume)
    if train(loaded, folder, resume, advise_at_start).stopped:
        leave_for_launcher("sslkit: stopped on request, checkpoint saved; the same command continues the run")
        raise typer.Exit(RESUMABLE)


def _plan(recipe: RecipeOptions, hours: float | None, folder: Path, resume: str) -> "Recipe":
    """Plan a run and print the plan; a run that was planned before, here or where it resumes from, keeps its plan."""
    from sslkit.engine.run_folder.resume import load_resumed
    from sslkit.plan.make_plan import DEFAULT_HOURS
    from sslkit.recipe.resolve import load_recipe

    if (folder / "recipe.toml").is_file():
        return load_recipe(folder / "recipe.toml", recipe.stated())
    if resume not in ("auto", "never"):
        loaded = load_resumed(resume, recipe.stated())
        stated = join(list(dict.fromkeys(each.partition("=")[0].strip() for each in recipe.stated())))
        length = pluralize(loaded.train.epochs, "epoch") + ("; --hours has no effect" if hours is not None else "")
        lines = [f"recipe: that of {resume}, not a new plan{f', with {stated} as stated' if stated else ''}; {length}"]
    else:
        plan = recipe.plan(hours or DEFAULT_HOURS)
        loaded, lines = plan.recipe, plan.lines()
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print_line(line)
    return loaded


def _exit_as_resumable_on_signals() -> None:
    """Exit with code 75 on SIGTERM and SIGUSR1 until the engine handles them: there is nothing to save yet."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda *_: os._exit(RESUMABLE))


def submit(
    recipe: RecipeName,
    resources: Resources,
    overrides: Overrides = None,
    output: Annotated[str, "Run folder, on a file system that all nodes share. Default: runs/NAME of the recipe."] = "",
    cluster: Annotated[str, "slurm, or local: processes on this machine."] = "slurm",
    dry_run: Annotated[bool, "Print the sbatch file; submit nothing."] = False,
    sbatch: Annotated[list[str] | None, "Another sbatch option, such as qos=high or exclusive; repeatable."] = None,
    setup: Annotated[list[str] | None, "Shell command to run before training; repeatable."] = None,
) -> None:
    """Submit a run to Slurm, with one process per GPU. The job is queued again at its time limit until the run is done.

    The same command continues a run whose job has ended. Needs submitit: pip install submitit.
    """
    from sslkit.recipe.resolve import load_recipe

    loaded = load_recipe(recipe, overrides)
    resources = dataclasses.replace(resources, sbatch=_sbatch_options(sbatch or []), setup=setup or [])
    folder = Path(output) if output else Path("runs") / Path(recipe).stem
    if dry_run:
        if cluster != "slurm":
            raise UserError(f"--dry-run: prints an sbatch file, which --cluster {cluster} does not use; remove one")
        print_text(batch_file(loaded, folder, resources))
        return
    submitted = submit_run(loaded, folder, resources, cluster)
    processes = pluralize(resources.processes, "process", "processes")
    print_line(f"job {submitted.job_id}: {processes}, run folder {folder}")
    cancel = f"{'scancel' if cluster == 'slurm' else 'kill'} {submitted.job_id}"
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
    crash_dump: Annotated[str, typer.Argument(help="A folder in capsules/ of the run folder.")],
    as_json: AsJson = False,
) -> None:
    """Recompute, on the CPU, a step that the guard refused, and name the first module with a non-finite output.

    Needs the images of the run at their original path. Changes nothing.
    """
    with fast_imports():
        from sslkit.engine.replay import replay_step

    found = replay_step(crash_dump)
    if as_json:  # JSON cannot hold NaN and infinity: the numbers become strings
        numbers = {
            when: {name: repr(value) for name, value in getattr(found, when).items()} for when in ("then", "now")
        }
        print_json({**dataclasses.asdict(found), **numbers, "same": found.same})
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


def _first(items: "list[int] | list[str]") -> str:
    more = len(items) - MAX_LISTED
    return ", ".join(map(str, items[:MAX_LISTED])) + (f" and {more} more" if more > 0 else "")
