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
from typing import TYPE_CHECKING, Any

from sslkit.cluster.job import CANCELLED, Pretraining
from sslkit.errors import UserError, check_path, without_tokens
from sslkit.recipe.resolve import Recipe

if TYPE_CHECKING:
    from submitit import LocalExecutor, SlurmExecutor

SIGNAL = "USR1"
TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+)(?::\d+)?)?)"
    r"|(?:(?P<hours_first>\d+):(?P<minutes_next>\d+):\d+)|(?P<minutes_only>\d+)(?::\d+)?"
)
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
    """The resources of a job. Empty strings and zeros use the defaults of the cluster.

    Attributes:
        nodes: Number of nodes.
        gpus_per_node: GPUs per node; each has one task.
        tasks_per_node: Processes per node; 0: one per GPU, or one without GPUs.
        time: Time limit of one start in Slurm's formats: minutes, ``H:M:S``, ``D-H``, ``D-H:M``.
        mem: Memory per node, such as ``64G``.
        cpus_per_task: CPU cores per process, including its data workers.
        partition: Slurm partition.
        account: Slurm account.
        constraint: Required features of the nodes.
        sbatch: Any other options of sbatch, by long name; True for an option without a value.
        setup: Shell lines to run before training, such as ``module load cuda``.
        signal_seconds: Seconds before the time limit at which the run is told to save.
        retries: The job is not requeued after this many consecutive starts without a new checkpoint.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int = 0
    time: str = "60"
    mem: str = ""
    cpus_per_task: int = 0
    partition: str = ""
    account: str = ""
    constraint: str = ""
    sbatch: dict[str, str | bool] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    signal_seconds: int = 120
    retries: int = 3

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
    """A submitted job.

    Attributes:
        job_id: Its ID on the cluster.
        log: Log file of the first process.
    """

    job_id: str
    log: Path


def submit(recipe: Recipe, output: str | Path, resources: Resources, cluster: str = "slurm") -> Submission:
    """Submit a run; if ``output`` holds a run, it is resumed.

    submitit keeps job files and logs in the folder ``OUTPUT.jobs``. All nodes must share it, the run folder and the
    data.

    Args:
        recipe: The recipe to train.
        output: Run folder.
        resources: Resources to request.
        cluster: ``slurm``, or ``local``: processes on this machine, restarted as Slurm would.

    Raises:
        UserError: The cluster refuses the job, or recipe and resources do not fit. Nothing has been submitted then.
    """
    check(recipe, resources)
    output = _run_folder(output)
    if cluster not in ("slurm", "local"):
        raise UserError(f"--cluster: must be slurm or local, not {cluster!r}")
    from sslkit.engine.run_folder.layout import check_folder, keep_background

    recipe, _ = keep_background(output, recipe)  # the recipe of the job states every key
    check_folder(output, recipe, "auto")  # instead of hours later, when the job starts
    if cluster == "local":
        return _submit_here(recipe, output, resources)
    if absent := next((name for name in ("sbatch", "srun") if shutil.which(name) is None), ""):
        raise UserError(
            f"submit: {absent} is not installed here; submit from a login node of a Slurm cluster, print the "
            "batch file with --dry-run, or use --cluster local"
        )
    executor = _slurm_executor(output, resources)
    return _submitted(executor, Pretraining(recipe.to_toml(), str(output)), _jobs_folder(output))


def batch_file(recipe: Recipe, output: str | Path, resources: Resources) -> str:
    """The batch file that `submit` would pass to sbatch.

    Raises:
        UserError: Recipe and resources do not fit.
    """
    check(recipe, resources)
    executor = _slurm_executor(_run_folder(output), resources)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def check(recipe: Recipe, resources: Resources) -> None:
    """Check that recipe and resources fit, before the job waits in a queue.

    Raises:
        UserError: They do not fit.
    """
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
    texts |= {f"--setup (line {line})": text for line, text in enumerate(resources.setup, start=1)}
    for option, text in texts.items():
        if without_tokens(text) != text:
            raise UserError(
                f"{option}: contains what looks like an access token, but the batch file is kept and others can read "
                "it; put the token into a file that only you can read, and use --setup '. ~/tokens.sh'"
            )
    for option in ("partition", "account", "constraint"):
        if not (text := getattr(resources, option)).isprintable():
            raise UserError(f"--{option} {text!r}: write one line without control characters")
    for option, value in resources.sbatch.items():
        name = option.replace("_", "-")
        if not OPTION.fullmatch(name):
            raise UserError(f"--sbatch {option!r}: write the long name of an option of sbatch, such as qos=high")
        if name in RESERVED:
            raise UserError(f"--sbatch {option}: is set by sslkit and cannot be changed")
        if name in OWN_OPTIONS:
            raise UserError(f"--sbatch {option}: use {OWN_OPTIONS[name]}, which is checked against the recipe")
        if not str(value).isprintable():
            raise UserError(f"--sbatch {option}: write one line without control characters, not {value!r}")


def minutes(time: str) -> int:
    """A time limit in one of Slurm's formats, in whole minutes.

    Raises:
        UserError: The format is invalid.
    """
    found = TIME.fullmatch(time)
    if not found:
        raise UserError(f"--time {time}: write minutes, H:M:S, D-H or D-H:M, such as 2-12 for two and a half days")
    part = {name: int(value) for name, value in found.groupdict(default="0").items()}
    hours = part["hours"] + part["hours_first"]
    return 1440 * part["days"] + 60 * hours + part["minutes"] + part["minutes_next"] + part["minutes_only"]


def _run_folder(output: str | Path) -> Path:
    """The absolute path of a run folder, without ``..``.

    Raises:
        UserError: Slurm could not write logs next to it.
    """
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
    executor.update_parameters(
        job_name=output.name,
        nodes=resources.nodes,
        ntasks_per_node=resources.tasks,
        gpus_per_node=resources.gpus_per_node or None,
        cpus_per_task=resources.cpus_per_task or None,
        time=minutes(resources.time),
        mem=resources.mem or None,
        partition=resources.partition or None,
        account=resources.account or None,
        constraint=resources.constraint or None,
        wckey=None,
        stderr_to_stdout=True,
        # srun does not inherit --cpus-per-task since Slurm 22.05, and must not kill tasks that are saving.
        srun_args=["--kill-on-bad-exit=0", *own_cores],
        setup=[*resources.setup, *_before(output)],
        teardown=_afterwards(output, resources.retries),
        additional_parameters=needed | resources.sbatch,
    )
    return executor


def _newest(output: Path) -> str:
    """Shell command that prints the name of the newest checkpoint."""
    return f"cat {shlex.quote(str(output / 'checkpoints' / 'latest'))} 2>/dev/null"


def _before(output: Path) -> list[str]:
    return [f"export SUBMITIT_PREEMPT_SIGNAL={SIGNAL}", f"before=$({_newest(output)})"]


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


def _submit_here(recipe: Recipe, output: Path, resources: Resources) -> Submission:
    submitit = _submitit()
    if resources.nodes > 1:
        raise UserError(f"--nodes {resources.nodes}: --cluster local runs on this machine only")
    from submitit.core.utils import environment_variables
    from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

    folder = _jobs_folder(output)
    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(
        tasks_per_node=resources.tasks,
        gpus_per_node=resources.gpus_per_node,
        timeout_min=minutes(resources.time),
        signal_delay_s=resources.signal_seconds,
        stderr_to_stdout=True,
    )
    task = Pretraining(recipe.to_toml(), str(output), LOCAL_REQUEUE_RETURN_CODE)
    with environment_variables(SUBMITIT_PREEMPT_SIGNAL=SIGNAL):
        return _submitted(executor, task, folder)


def _submitted(executor: "SlurmExecutor | LocalExecutor", task: Pretraining, folder: Path) -> Submission:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with redirect_stderr(StringIO()):  # submitit prints the error of sbatch, and also raises it
            job = executor.submit(task)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"submit: the cluster refuses the job: {' '.join(str(error).split())[:500]}") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror or error}") from error
    return Submission(job.job_id, job.paths.stdout)
