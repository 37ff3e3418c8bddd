"""What each task of a submitted job does: join the others, train, and say by its exit code how that ended.

Heavy imports wait until signals are listened to. submitit stores `Pretraining` by its place and fields, so that a job
that waited for days in the queue runs the recipe as it was when it was submitted.
"""

import os
import signal
import sys
import tomllib
from dataclasses import dataclass

from sslkit.errors import RunError, UserError
from sslkit.terminal import error_messages, print_message, print_traceback

RESUMABLE = 75  # exit code: asked to stop, goes on when started again
CANCELLED = 128 + signal.SIGTERM  # exit code: asked to end, by scancel or by a preemption that Slurm itself undoes
FIRST_PORT, PORTS = 20000, 12000  # below those that Linux gives to whoever asks for any


@dataclass(frozen=True)
class Pretraining:
    """One run, as one task of its job does it.

    Attributes:
        recipe: Its resolved recipe, as TOML.
        output: Run folder.
        resumable: Exit code of a run that should be queued again; submitit's local cluster has its own.
    """

    recipe: str
    output: str
    resumable: int = RESUMABLE

    def __call__(self) -> str:
        """Train; returns the run folder once the run is done.

        Raises:
            SystemExit: It is not: `resumable`, `CANCELLED`, 2 for bad input, 1 for a run that cannot go on.
        """
        signal.signal(signal.SIGUSR1, lambda *_: os._exit(self.resumable))
        signal.signal(signal.SIGTERM, lambda *_: os._exit(CANCELLED))
        try:
            join_tasks()
            from sslkit.engine import train
            from sslkit.recipe.resolve import build_recipe

            run = train(build_recipe(tomllib.loads(self.recipe), name="the submitted recipe"), self.output)
        except (UserError, RunError) as error:
            for sentence in error_messages(error):
                print_message(sentence)
            sys.exit(2 if isinstance(error, UserError) else 1)
        except Exception as error:  # submitit would print it, and store it, with whatever tokens it holds
            print_traceback(error)
            sys.exit(1)
        if run.stopped:
            sys.exit(CANCELLED if run.stopped == "SIGTERM" else self.resumable)
        return self.output


def join_tasks() -> None:
    """Tell PyTorch which of the job's tasks this is, and where the first one is met.

    All GPUs of the node stay visible; Accelerate takes the one of the local rank. Each restart has another port, as
    something may sit on the last one's.
    """
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    job = JobEnvironment()
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    os.environ["MASTER_PORT"] = str(FIRST_PORT + (int(job.raw_job_id) + 997 * restarts) % PORTS)
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if job.cluster == "local":
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # a machine need not know its own name
