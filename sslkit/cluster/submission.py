"""Jobs: one task per GPU, warned before their time is over, queued again until the run is done.

A task per GPU, and not torchrun on each node: Slurm's warning then reaches every process itself, there is no launcher
that dies of it or hides an exit code, and srun tells the batch script how the run ended. That script decides:

    0      done
    2      bad input: queueing it again would not help
    143    ended by scancel, or preempted: Slurm itself queues preempted jobs again (``--requeue``)
    else   stopped before its time was over (75), or crashed: queued again, unless several starts in a row
           have brought no new checkpoint
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
OURS = ("signal", "requeue", "no-requeue", "array", "output", "error", "open-mode", "job-name", "wckey")
WITH_WORDS = {  # options of sbatch, and the word here that the checks know of
    **{name: f"--{name}" for name in ("nodes", "gpus-per-node", "time", "mem", "cpus-per-task")},
    **{name: f"--{name}" for name in ("partition", "account", "constraint")},
    **dict.fromkeys(("ntasks", "ntasks-per-node", "gpus", "gpus-per-task"), "--gpus-per-node or --tasks-per-node"),
}


@dataclass(frozen=True)
class Resources:
    """What a job asks for; empty words and zeros leave it to the cluster.

    Attributes:
        nodes: Machines.
        gpus_per_node: GPUs of each, and so many tasks.
        tasks_per_node: Processes of each, where that is not the number of GPUs (0: it is; one on CPUs).
        time: Limit of one start, in Slurm's words: minutes, ``H:M:S``, ``D-H``, ``D-H:M``.
        mem: Of a node, such as ``64G``.
        cpus_per_task: Cores of each process: itself and its data workers.
        partition: Slurm's queue.
        account: Who pays.
        constraint: Features the nodes must have.
        sbatch: Any other option of sbatch, by its long name; True for one that takes no value.
        setup: Lines of shell before the run, such as ``module load cuda``.
        signal_seconds: How long before its end a start is told to save.
        retries: Starts in a row without a new checkpoint after which it is not queued again.
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
        """On each node."""
        return self.tasks_per_node or max(self.gpus_per_node, 1)

    @property
    def processes(self) -> int:
        """On all nodes."""
        return self.nodes * self.tasks


@dataclass(frozen=True)
class Submission:
    """A job that waits or runs.

    Attributes:
        job_id: The cluster's number of it.
        log: File that the first process writes to.
    """

    job_id: str
    log: Path


def submit(recipe: Recipe, output: str | Path, resources: Resources, cluster: str = "slurm") -> Submission:
    """Submit a run; it goes on in ``output`` if that holds one.

    submitit keeps job files and logs in the folder ``OUTPUT.jobs``, which all nodes must see as they must see output
    and data.

    Args:
        recipe: What to train.
        output: Run folder.
        resources: What to ask for.
        cluster: ``slurm``, or ``local``: processes on this machine, started again as Slurm would.

    Raises:
        UserError: The cluster refuses, or something asked for does not fit; nothing has been submitted then.
    """
    check(recipe, resources)
    output = _run_folder(output)
    if cluster not in ("slurm", "local"):
        raise UserError(f"--cluster: must be slurm or local, not {cluster!r}")
    from sslkit.engine.run_folder.layout import as_begun, check_folder

    recipe, _ = as_begun(output, recipe)  # the job's recipe names every key
    check_folder(output, recipe, "auto")  # as the job itself would, hours later
    if cluster == "local":
        return _submit_here(recipe, output, resources)
    if absent := next((name for name in ("sbatch", "srun") if shutil.which(name) is None), ""):
        raise UserError(
            f"submit: there is no {absent} here; submit from a login node of a Slurm cluster, print the file with "
            "--dry-run, or take --cluster local"
        )
    executor = _slurm_executor(output, resources)
    return _submitted(executor, Pretraining(recipe.to_toml(), str(output)), _jobs_folder(output))


def batch_file(recipe: Recipe, output: str | Path, resources: Resources) -> str:
    """The file that `submit` would give to sbatch.

    Raises:
        UserError: Something asked for does not fit.
    """
    check(recipe, resources)
    executor = _slurm_executor(_run_folder(output), resources)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def check(recipe: Recipe, resources: Resources) -> None:
    """See that recipe and resources fit, which is better known before hours in a queue.

    Raises:
        UserError: They do not.
    """
    processes, asked, batch = resources.processes, recipe.train.processes, recipe.train.batch_size
    if asked and asked != processes:
        raise UserError(f"[train] processes = {asked}, but --nodes and --gpus-per-node make {processes}")
    if batch % processes:
        raise UserError(f"[train] batch_size: {batch} images do not divide among {processes} processes")
    if resources.mem and not MEMORY.fullmatch(resources.mem):
        raise UserError(f"--mem {resources.mem}: write a number and K, M, G or T, such as 64G")
    if 60 * minutes(resources.time) <= resources.signal_seconds:
        raise UserError(
            f"--time {resources.time}: leaves nothing to train in, as the run is told to save "
            f"{resources.signal_seconds} s before its end (--signal-seconds)"
        )
    _check_words(resources)


def _check_words(resources: Resources) -> None:
    """See that each word is one line of the batch file, that nothing is said twice, and that no token is among them."""
    words = {f"--{option}": getattr(resources, option) for option in ("partition", "account", "constraint")}
    words |= {f"--sbatch {option}": str(value) for option, value in resources.sbatch.items()}
    words |= {f"--setup (line {line})": text for line, text in enumerate(resources.setup, start=1)}
    for option, word in words.items():
        if without_tokens(word) != word:
            raise UserError(
                f"{option}: holds what looks like an access token, and the job's file is kept and others can read it; "
                "write it into a file that only you can read, and give --setup '. ~/tokens.sh'"
            )
    for option in ("partition", "account", "constraint"):
        if not (word := getattr(resources, option)).isprintable():
            raise UserError(f"--{option} {word!r}: write one line without control characters")
    for option, value in resources.sbatch.items():
        name = option.replace("_", "-")
        if not OPTION.fullmatch(name):
            raise UserError(f"--sbatch {option!r}: write the long name of an option of sbatch, such as qos=high")
        if name in OURS:
            raise UserError(f"--sbatch {option}: is set by sslkit, which needs it as it is")
        if name in WITH_WORDS:
            raise UserError(f"--sbatch {option}: use {WITH_WORDS[name]}, which is checked against the recipe")
        if not str(value).isprintable():
            raise UserError(f"--sbatch {option}: write one line without control characters, not {value!r}")


def minutes(time: str) -> int:
    """Slurm's words for a time limit, in whole minutes.

    Raises:
        UserError: They are none.
    """
    found = TIME.fullmatch(time)
    if not found:
        raise UserError(f"--time {time}: write minutes, H:M:S, D-H or D-H:M, such as 2-12 for two and a half days")
    part = {name: int(value) for name, value in found.groupdict(default="0").items()}
    hours = part["hours"] + part["hours_first"]
    return 1440 * part["days"] + 60 * hours + part["minutes"] + part["minutes_next"] + part["minutes_only"]


def _run_folder(output: str | Path) -> Path:
    """A run folder's full name, without ``..``.

    Raises:
        UserError: Slurm could not write logs beside it.
    """
    check_path(output, "--output")
    folder = Path(os.path.abspath(output))
    if not folder.name:
        raise UserError(f"--output {output}: logs lie beside the run folder, so it must lie in another folder")
    if "%" in str(folder) or "\\" in str(folder) or not str(folder).isprintable():
        raise UserError(
            f"--output {str(folder)!r}: Slurm reads % and \\ in the names of logs in its own way; choose a folder "
            "without these and without control characters"
        )
    return folder


def _jobs_folder(output: Path) -> Path:
    """Beside the run and not in it: what submitit keeps is no part of a run."""
    return output.with_name(f"{output.name}.jobs")


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError("submit: needs submitit; install it with: pip install submitit") from None
    return submitit


def _slurm_executor(output: Path, resources: Resources) -> "SlurmExecutor":
    base = _submitit().SlurmExecutor
    # The file can be looked at where there is no Slurm; `submit` has looked for it.
    anywhere = type("SlurmExecutor", (base,), {"affinity": classmethod(lambda _cls: 1)})
    executor: SlurmExecutor = anywhere(_jobs_folder(output))
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
        # Since 22.05 srun does not take the cores from sbatch. It must not end tasks that are saving.
        srun_args=["--kill-on-bad-exit=0", *own_cores],
        setup=[*resources.setup, *_before(output)],
        teardown=_afterwards(output, resources.retries),
        additional_parameters=needed | resources.sbatch,
    )
    return executor


def _newest(output: Path) -> str:
    """Shell for the name of a run's newest checkpoint."""
    return f"cat {shlex.quote(str(output / 'checkpoints' / 'latest'))} 2>/dev/null"


def _before(output: Path) -> list[str]:
    return [f"export SUBMITIT_PREEMPT_SIGNAL={SIGNAL}", f"before=$({_newest(output)})"]


def _afterwards(output: Path, retries: int) -> list[str]:
    """Shell that queues the job again if that is of use, and else exits as the run did."""
    fruitless = shlex.quote(str(_jobs_folder(output))) + '/"$SLURM_JOB_ID".fruitless'
    return [
        "code=$?",
        f'case "$code" in 0|2|{CANCELLED}) exit "$code";; esac',
        f'if [ "$({_newest(output)})" = "$before" ]; then echo "exit code $code" >> {fruitless}; '
        f"else rm -f {fruitless}; fi",
        f"if [ -e {fruitless} ] && [ $(wc -l < {fruitless}) -ge {retries} ]; then "
        f'echo "sslkit: not queued again: {retries} starts in a row made no checkpoint" >&2; exit "$code"; fi',
        'scontrol requeue "$SLURM_JOB_ID"',
    ]


def _submit_here(recipe: Recipe, output: Path, resources: Resources) -> Submission:
    submitit = _submitit()
    if resources.nodes > 1:
        raise UserError(f"--nodes {resources.nodes}: --cluster local has this machine only")
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
        with redirect_stderr(StringIO()):  # submitit prints sbatch's words there, and raises them
            job = executor.submit(task)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"submit: the cluster refuses: {' '.join(str(error).split())[:500]}") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror or error}") from error
    return Submission(job.job_id, job.paths.stdout)
