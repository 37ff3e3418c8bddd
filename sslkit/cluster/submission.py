"""Submit jobs with one task per GPU, which get a signal before their time limit and are requeued until finished.

Each GPU has a task of its own instead of torchrun on each node. So the signal reaches every process, no launcher ends
because of it or hides exit codes, and srun returns the exit code of the run to the batch script, which decides:

    0      finished
    2      invalid input: another start would not help
    143    ended by scancel, or preempted: Slurm requeues preempted jobs itself (``--requeue``)
    else   stopped before the time limit (75), or crashed: requeued, unless several consecutive starts
           have saved no new checkpoint
"""

import os
import re
import shlex
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslkit.cluster.job import CANCELLED, Pretraining
from sslkit.errors import UserError, check_path, without_tokens
from sslkit.exit_codes import RESUMABLE

if TYPE_CHECKING:
    from submitit import LocalExecutor, SlurmExecutor

    from sslkit.recipe.resolve import Recipe

SIGNAL = "USR1"
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+)(:\d+)?)?")
MEMORY = re.compile(r"\d+[KMGT]?")
OPTION = re.compile(r"[a-z][a-z0-9-]*")
RESERVED = ("signal", "requeue", "no-requeue", "array", "output", "error", "open-mode", "job-name", "wckey")
OWN_OPTIONS = {  # options of sbatch, and the options of sslkit to use instead
    **{name: f"--{name}" for name in ("nodes", "gpus-per-node", "time", "mem", "cpus-per-task")},
    **{name: f"--{name}" for name in ("partition", "account", "constraint")},
    **dict.fromkeys(("ntasks", "ntasks-per-node", "gpus", "gpus-per-task"), "--gpus-per-node or --tasks-per-node"),
}


@dataclass(frozen=True)
class Resources:
    """The resources of a job; the annotated ones are options of ``sslkit submit``.

    Empty strings and zeros use the defaults of the cluster. ``sbatch`` holds other options of sbatch by long name, True
    for an option without a value; ``setup`` shell lines to run before training, such as ``module load cuda``.
    """

    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs per node; one process per GPU.")] = 0
    tasks_per_node: Annotated[int, typer.Option(min=0, help="Processes per node; 0: one per GPU, at least 1.")] = 0
    time: Annotated[str, "Time limit of each job: minutes, HH:MM:SS, D-HH or D-HH:MM."] = "60"
    mem: Annotated[str, "Memory per node, such as 64G."] = ""
    cpus_per_task: Annotated[int, typer.Option(min=0, help="CPU cores per process, including its workers.")] = 0
    partition: Annotated[str, "Slurm partition."] = ""
    account: Annotated[str, "Slurm account."] = ""
    constraint: Annotated[str, "Required node features."] = ""
    sbatch: dict[str, str | bool] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    signal_seconds: Annotated[int, typer.Option(min=10, help="Save this many seconds before the time limit.")] = 120
    retries: Annotated[int, typer.Option(min=1, help="Give up after this many jobs without a new checkpoint.")] = 3

    @property
    def tasks(self) -> int:
        """Number of tasks per node."""
        return self.tasks_per_node or max(self.gpus_per_node, 1)

    @property
    def processes(self) -> int:
        """Number of processes on all nodes."""
        return self.nodes * self.tasks


@dataclass(frozen=True)
class Submission:
    """A submitted job: its ID on the cluster, and the log file of its first process."""

    job_id: str
    log: Path


def submit(recipe: "Recipe", output: str | Path, resources: Resources, cluster: str = "slurm") -> Submission:
    """Submit a run; if ``output`` holds a run, it is resumed.

    submitit keeps job files and logs in the folder ``OUTPUT.jobs``. All nodes must share it, the run folder and the
    data. ``cluster`` is ``slurm``, or ``local`` for processes on this machine, restarted as Slurm would.

    Raises:
        UserError: The cluster refuses the job, or recipe and resources do not fit. Nothing has been submitted then.
    """
    check(recipe, resources)
    output = _run_folder(output)
    if cluster not in ("slurm", "local"):
        raise UserError(f"--cluster: must be slurm or local, not {cluster!r}")
    from sslkit.engine.run_folder.resume import check_folder, keep_earlier_defaults

    recipe, _ = keep_earlier_defaults(output, recipe)  # the recipe of the job states every key
    check_folder(output, recipe, "auto")  # instead of hours later, when the job starts
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing and cluster == "slurm":
        raise UserError(
            f"submit: {missing[0]} is not installed here; submit from a login node of a Slurm cluster, print the "
            "batch file with --dry-run, or use --cluster local"
        )
    executor = _slurm_executor(output, resources) if cluster == "slurm" else _local_executor(output, resources)
    from submitit.core.utils import FailedJobError, FailedSubmissionError, environment_variables
    from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

    resumable = RESUMABLE if cluster == "slurm" else LOCAL_REQUEUE_RETURN_CODE
    try:
        _jobs_folder(output).mkdir(parents=True, exist_ok=True)
        # submitit prints the error of sbatch, and also raises it.
        with redirect_stderr(StringIO()), environment_variables(SUBMITIT_PREEMPT_SIGNAL=SIGNAL):
            job = executor.submit(Pretraining(recipe.to_toml(), str(output), resumable))
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"submit: the cluster refuses the job: {' '.join(str(error).split())[:500]}") from error
    except OSError as error:
        raise UserError(f"{_jobs_folder(output)}: cannot be written to: {error.strerror or error}") from error
    return Submission(job.job_id, job.paths.stdout)


def batch_file(recipe: "Recipe", output: str | Path, resources: Resources) -> str:
    """The batch file that `submit` would pass to sbatch; a UserError if recipe and resources do not fit."""
    check(recipe, resources)
    executor = _slurm_executor(_run_folder(output), resources)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def check(recipe: "Recipe", resources: Resources) -> None:
    """Check that recipe and resources fit, before the job waits in a queue; a UserError if they do not."""
    processes, asked, batch = resources.processes, recipe.train.processes, recipe.train.batch_size
    if asked and asked != processes:
        raise UserError(f"[train] processes = {asked}, but --nodes and --gpus-per-node make {processes}")
    if batch % processes:
        raise UserError(f"[train] batch_size: {batch} images cannot be split evenly over {processes} processes")
    if resources.mem and not MEMORY.fullmatch(resources.mem):
        raise UserError(f"--mem {resources.mem}: write a number and K, M, G or T, such as 64G")
    if 60 * minutes(resources.time) <= resources.signal_seconds:
        raise UserError(
            f"--time {resources.time}: leaves no time to train, because the run is told to save "
            f"{resources.signal_seconds} s before the limit (--signal-seconds)"
        )
    _check_options(resources)


def _check_options(resources: Resources) -> None:
    """Check that options are single lines, do not repeat options of sslkit, and contain no access token."""
    texts = {f"--{option}": getattr(resources, option) for option in ("partition", "account", "constraint")}
    texts |= {f"--sbatch {option}": str(value) for option, value in resources.sbatch.items()}
    lines = {f"--setup (line {line})": text for line, text in enumerate(resources.setup, start=1)}
    for option, text in {**texts, **lines}.items():
        if without_tokens(text) != text:
            raise UserError(
                f"{option}: contains what looks like an access token, but the batch file is kept and others can read "
                "it; put the token into a file that only you can read, and use --setup '. ~/tokens.sh'"
            )
    for option in resources.sbatch:
        name = option.replace("_", "-")
        if not OPTION.fullmatch(name):
            raise UserError(f"--sbatch {option!r}: write the long name of an option of sbatch, such as qos=high")
        if name in RESERVED:
            raise UserError(f"--sbatch {option}: is set by sslkit and cannot be changed")
        if name in OWN_OPTIONS:
            raise UserError(f"--sbatch {option}: use {OWN_OPTIONS[name]}, which is checked against the recipe")
    for option, text in texts.items():
        if not text.isprintable():
            raise UserError(f"{option}: write one line without control characters, not {text!r}")


def minutes(time: str) -> int:
    """A time limit in one of Slurm's formats, in whole minutes; a UserError if it has another format."""
    found = TIME.fullmatch(time)
    if not found:
        raise UserError(f"--time {time}: write minutes, H:M:S, D-H or D-H:M, such as 2-12 for two and a half days")
    days, first, second, seconds = found.groups()
    if not (days or seconds):
        return int(first)  # minutes, or minutes and seconds
    return 1440 * int(days or 0) + 60 * int(first) + int(second or 0)


def _run_folder(output: str | Path) -> Path:
    """The absolute path of a run folder, without ``..``; a UserError if Slurm could not write logs next to it."""
    check_path(output, "--output")
    folder = Path(os.path.abspath(output))
    if not folder.name:
        raise UserError(f"--output {output}: logs are written next to the run folder, so it cannot be the root folder")
    if "%" in str(folder) or "\\" in str(folder) or not str(folder).isprintable():
        raise UserError(
            f"--output {str(folder)!r}: Slurm interprets % and \\ in paths of logs; choose a path without them and "
            "without control characters"
        )
    return folder


def _jobs_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.jobs")


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError("submit: needs submitit; install it with: pip install submitit") from None
    return submitit


def _slurm_executor(output: Path, resources: Resources) -> "SlurmExecutor":
    base = _submitit().SlurmExecutor
    # Without this, the batch file could only be shown where Slurm is installed. `submit` has checked for sbatch.
    without_slurm = type("SlurmExecutor", (base,), {"affinity": classmethod(lambda _cls: 1)})
    executor: SlurmExecutor = without_slurm(_jobs_folder(output))
    needed = {"requeue": True, "signal": f"{SIGNAL}@{resources.signal_seconds}"}
    own_cores = [f"--cpus-per-task={resources.cpus_per_task}"] if resources.cpus_per_task else []
    unchanged = ("nodes", "gpus_per_node", "cpus_per_task", "mem", "partition", "account", "constraint")
    executor.update_parameters(
        **{name: getattr(resources, name) or None for name in unchanged},
        job_name=output.name,
        ntasks_per_node=resources.tasks,
        time=minutes(resources.time),
        wckey=None,
        stderr_to_stdout=True,
        # srun does not inherit --cpus-per-task since Slurm 22.05, and must not kill tasks that are saving.
        srun_args=["--kill-on-bad-exit=0", *own_cores],
        setup=[*resources.setup, f"export SUBMITIT_PREEMPT_SIGNAL={SIGNAL}", f"before=$({_newest(output)})"],
        teardown=_afterwards(output, resources.retries),
        additional_parameters=needed | resources.sbatch,
    )
    return executor


def _newest(output: Path) -> str:
    """Shell command that prints the name of the newest checkpoint."""
    return f"cat {shlex.quote(str(output / 'checkpoints' / 'latest'))} 2>/dev/null"


def _afterwards(output: Path, retries: int) -> list[str]:
    """Shell lines that requeue the job if another start can help, and else exit with the code of the run."""
    fruitless = shlex.quote(str(_jobs_folder(output))) + '/"$SLURM_JOB_ID".fruitless'
    return [
        "code=$?",
        f'case "$code" in 0|2|{CANCELLED}) exit "$code";; esac',
        f'if [ "$({_newest(output)})" = "$before" ]; then echo "exit code $code" >> {fruitless}; '
        f"else rm -f {fruitless}; fi",
        f"if [ -e {fruitless} ] && [ $(wc -l < {fruitless}) -ge {retries} ]; then "
        f'echo "sslkit: not requeued: {retries} consecutive starts saved no checkpoint" >&2; exit "$code"; fi',
        'scontrol requeue "$SLURM_JOB_ID"',
    ]


def _local_executor(output: Path, resources: Resources) -> "LocalExecutor":
    if resources.nodes > 1:
        raise UserError(f"--nodes {resources.nodes}: --cluster local runs on this machine only")
    executor: LocalExecutor = _submitit().LocalExecutor(_jobs_folder(output))
    executor.update_parameters(
        tasks_per_node=resources.tasks,
        gpus_per_node=resources.gpus_per_node,
        timeout_min=minutes(resources.time),
        signal_delay_s=resources.signal_seconds,
        stderr_to_stdout=True,
    )
    return executor
