"""What went wrong among processes: which one is to blame, and what the errors of NCCL mean.

gloo's calls return when the collective is done, so a process knows which collective it waits in. NCCL's return at once,
and the process waits later, wherever it reads a result: there, only the steps that processes have reached are compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sslkit.errors import RunError, first_line

WAITING, TIMED_OUT = "in the collective ", "timed out waiting for others"
TRAINING, LOADING = "in forward and backward", "waiting for data"  # activities of a process
STOPPED = "stopped by "
NOBODY = "no process is dead or behind"
HANGS = (
    f"{NOBODY}, so the GPU of one or the network hangs: look for Xid errors in `dmesg`, for a GPU with an error in "
    "`nvidia-smi`, and set NCCL_DEBUG=INFO for the next start"
)
# NCCL's watchdog aborts the process without a sentence; ours must come first. A process may launch a few more steps
# after the one that hangs, so that our clock starts later than NCCL's.
NCCL_MARGIN = timedelta(seconds=60)

# What NCCL says (the first that is found counts), what it means, and what to check.
NCCL_ERRORS = {
    "Duplicate GPU": "two processes use one GPU: start one process for each GPU, and check CUDA_VISIBLE_DEVICES",
    "shared memory segment": "/dev/shm is too small: start the container with --shm-size=8g or --ipc=host",
    "out of memory": "the GPU has no memory left for NCCL's buffers: set a smaller [train] micro_batch or batch_size",
    "ollective operation timeout": "a collective took too long, as a process did not join it or the network hangs",
    "operation timed out": "a collective took too long, as a process did not join it or the network hangs",
    "remote process exited": "another process has ended, or the network between them failed: the first error counts",
    "ncclRemoteError": "another process has ended, or the network between them failed: the first error counts",
    "communicator was aborted": "NCCL gave up after an earlier error, which is above this one",
    "unhandled system error": "a system call of NCCL failed: name the network interface in NCCL_SOCKET_IFNAME, try "
    "NCCL_IB_DISABLE=1 where there is no InfiniBand, and check `ulimit -l` (memory that can be locked) and /dev/shm",
    "unhandled cuda error": "a CUDA call of NCCL failed: look for Xid errors in `dmesg`, and compare the versions of "
    "the driver and of CUDA in `nvidia-smi` on all machines",
    "invalid usage": "the processes do not fit together: one process for each GPU, the same versions of torch and NCCL "
    "on all machines",
    "internal error": "a check inside NCCL failed, often as versions differ: the same torch, NCCL and driver on all "
    "machines",
}
ANY_NCCL = "a collective failed"


def group_timeout(seconds: float, *, on_gpu: bool) -> timedelta:
    """The timeout of the process group, if a step may take this long: NCCL's is longer, so that ours is first."""
    return timedelta(seconds=seconds) + (NCCL_MARGIN if on_gpu else timedelta(0))


def is_nccl_error(error: BaseException) -> bool:
    """Whether an exception is of NCCL, or of PyTorch's watchdog of its collectives."""
    return isinstance(error, RuntimeError) and ("NCCL" in str(error) or "Watchdog caught" in str(error))


def is_others_fault(error: BaseException) -> bool:
    """Whether an exception comes from a collective that failed because of another process."""
    # gloo raises plain RuntimeErrors
    of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return isinstance(error, dist.DistError) or of_gloo or is_nccl_error(error)


def describe_failure(error: BaseException) -> str:
    """Why a collective failed, in a few words: for NCCL what its error means and what to check, else the error."""
    if not is_nccl_error(error):
        return first_line(error, limit=100_000)[-160:]
    text = str(error)
    kind = next((kind for kind in NCCL_ERRORS if kind.lower() in text.lower()), "")
    known = f"{NCCL_ERRORS[kind]}; " if kind else f"{ANY_NCCL}: {first_line(error, limit=100_000)[-160:]}; "
    return f"NCCL: {known}NCCL_DEBUG=INFO says more"


@contextmanager
def explain_nccl() -> Iterator[None]:
    """Turn an error of NCCL into a `RunError` of one sentence."""
    try:
        yield
    except RunError:
        raise
    except RuntimeError as error:
        if not is_nccl_error(error):
            raise
        raise RunError(f"the processes cannot exchange data. {describe_failure(error)}") from error


def find_problem(
    other: int, before: dict[str, Any], after: dict[str, Any], own: dict[str, Any], *, blocking: bool
) -> str:
    """What is wrong with another process, by two of its heartbeats; empty if nothing is.

    ``own`` has the step and the activity of this process. ``blocking`` says that a process knows which collective it
    waits in.
    """
    if not after:
        return f"process {other} has sent no heartbeat"
    step, doing = after["step"], after["doing"]
    if doing.startswith(STOPPED):
        return f"process {other} {doing} at step {step}"
    if before and after["count"] == before["count"]:
        return f"process {other} is dead or frozen; its last heartbeat was at step {step}, {doing}"
    elsewhere = blocking and not doing.startswith((WAITING, TIMED_OUT))
    loading = step == own["step"] and doing == LOADING and own["doing"] == TRAINING
    if step < own["step"] or elsewhere or loading:
        return f"process {other} is alive at step {step}, {doing}"
    return ""
