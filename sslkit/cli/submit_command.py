"""``sslkit submit``: a run on a cluster."""

from pathlib import Path
from typing import Annotated

import typer

from sslkit.cli.options import Overrides, RecipeName
from sslkit.errors import UserError, counted
from sslkit.terminal import show, show_text


def submit(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Annotated[str, typer.Option(help="Run folder, seen by all nodes. Default: runs/NAME of the recipe.")] = "",
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each; a process for each of them.")] = 0,
    tasks_per_node: Annotated[
        int, typer.Option(min=0, help="Processes on each. Default: one for each GPU, or one.")
    ] = 0,
    time: Annotated[str, typer.Option(help="Limit of one start: minutes, H:M:S, D-H or D-H:M.")] = "60",
    mem: Annotated[str, typer.Option(help="Memory of a node, such as 64G.")] = "",
    cpus_per_task: Annotated[int, typer.Option(min=0, help="Cores of each process, data workers included.")] = 0,
    partition: Annotated[str, typer.Option(help="Slurm's queue.")] = "",
    account: Annotated[str, typer.Option(help="Slurm's account.")] = "",
    constraint: Annotated[str, typer.Option(help="Features the nodes must have.")] = "",
    sbatch: Annotated[
        list[str] | None, typer.Option(help="Another option of sbatch, such as qos=high or exclusive; may repeat.")
    ] = None,
    setup: Annotated[list[str] | None, typer.Option(help="Line of shell to run before; may repeat.")] = None,
    signal_seconds: Annotated[int, typer.Option(min=10, help="How long before its end it is told to save.")] = 120,
    retries: Annotated[
        int, typer.Option(min=1, help="Starts in a row without a new checkpoint after which it is given up.")
    ] = 3,
    cluster: Annotated[str, typer.Option(help="slurm, or local: processes on this machine.")] = "slurm",
    dry_run: Annotated[bool, typer.Option(help="Print the file for sbatch, and submit nothing.")] = False,
) -> None:
    """Submit a run as a job with one process per GPU. It saves before its time is over, and is queued again until done.

    The same command continues a run whose job has ended. Needs submitit: pip install submitit.
    """
    from sslkit.cluster.submission import Resources, batch_file
    from sslkit.cluster.submission import submit as submit_run
    from sslkit.recipe.resolve import load_recipe

    loaded = load_recipe(recipe, overrides)
    resources = Resources(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks_per_node,
        time=time,
        mem=mem,
        cpus_per_task=cpus_per_task,
        partition=partition,
        account=account,
        constraint=constraint,
        sbatch=_options(sbatch or []),
        setup=setup or [],
        signal_seconds=signal_seconds,
        retries=retries,
    )
    folder = Path(output) if output else Path("runs") / Path(recipe).stem
    if dry_run:
        _refuse_others(cluster)
        show_text(batch_file(loaded, folder, resources))
        return
    job = submit_run(loaded, folder, resources, cluster)
    end_it = f"scancel {job.job_id}" if cluster == "slurm" else f"kill {job.job_id}"
    show(f"job {job.job_id}: {counted(resources.processes, 'process', 'processes')}, run folder {folder}")
    show(f"log {job.log}; {end_it} ends it, and the same command continues it")


def _refuse_others(cluster: str) -> None:
    if cluster != "slurm":
        raise UserError(f"--dry-run: prints a file for sbatch; there is none with --cluster {cluster}")


def _options(words: list[str]) -> dict[str, str | bool]:
    """``name=value`` each, or a name alone; with or without its dashes."""
    options: dict[str, str | bool] = {}
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        if not name or (equals and not value):
            raise UserError(f"--sbatch {word}: write name=value, such as qos=high, or a name alone, such as exclusive")
        options[name] = value if equals else True
    return options
