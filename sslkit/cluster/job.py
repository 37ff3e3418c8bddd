"""The task of a submitted job: join the process group, train, and report the result as exit code.

Heavy imports come after the signal handlers are set. submitit stores `Pretraining` by module and fields, so a job that
waited in the queue for days runs the recipe as it was when it was submitted.
"""

import os
import signal
import sys
import tomllib
from dataclasses import dataclass

from sslkit.errors import RunError, UserError
from sslkit.exit_codes import RESUMABLE
from sslkit.terminal import error_messages, print_message, print_traceback

CANCELLED = 128 + signal.SIGTERM  # exit code: ended by scancel, or by a preemption after which Slurm requeues the job
FIRST_PORT, PORTS = 20000, 12000  # below the ephemeral ports of Linux


@dataclass(frozen=True)
class Pretraining:
    """One task of a job that trains a run."""

    recipe: str  # resolved, as TOML
    output: str  # run folder
    resumable: int = RESUMABLE  # exit code of a run that should be requeued; submitit's local cluster has its own

    def __call__(self) -> str:
        """Train; returns the run folder when the run is finished.

        Exits with `resumable`, `CANCELLED`, 2 for invalid input, or 1 for a run that cannot continue.
        """
        signal.signal(signal.SIGUSR1, lambda *_: os._exit(self.resumable))
        signal.signal(signal.SIGTERM, lambda *_: os._exit(CANCELLED))
        try:
            join_tasks()
            from sslkit.engine import train
            from sslkit.recipe.resolve import build_recipe

            run = train(build_recipe(tomllib.loads(self.recipe), name="the submitted recipe"), self.output)
        except (UserError, RunError) as error:
            for message in error_messages(error):
                print_message(message)
            sys.exit(2 if isinstance(error, UserError) else 1)
        except Exception as error:  # submitit would print and store it, including any access tokens
            print_traceback(error)
            sys.exit(1)
        if run.stopped:
            sys.exit(CANCELLED if run.stopped == "SIGTERM" else self.resumable)
        return self.output


def join_tasks() -> None:
    """Set the environment variables of torch.distributed: rank, world size, and address of the first task.

    All GPUs of the node stay visible; Accelerate selects the one of the local rank. Each restart uses another port,
    because the last one may still be in use.
    """
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    job = JobEnvironment()
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    os.environ["MASTER_PORT"] = str(FIRST_PORT + (int(job.raw_job_id) + 997 * restarts) % PORTS)
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if job.cluster == "local":
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # the host name may not resolve
