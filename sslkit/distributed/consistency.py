"""Check that all processes train the same model: at the start of a run, and every few steps."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sslkit.distributed.collectives import gather_objects, gather_rows, world_size
from sslkit.errors import RunError, UserError

Result = TypeVar("Result")

RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
CHUNK = 1 << 22  # 32-bit words summed at a time, to bound the memory for large memory banks


def all_or_none(work: Callable[[], Result]) -> Result:
    """Call ``work`` on every process. If some raise a UserError, all raise that of the lowest rank, and none waits."""
    result: Result
    problem = None
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    for message in gather_objects(problem):
        if message is not None:
            raise UserError(message)
    return result


def compare_facts(facts: dict[str, Any]) -> None:
    """Raise a RunError if a fact, such as the recipe, differs between processes; names the fact and the processes."""
    first, *others = gather_objects(facts)
    for name in facts:
        if ranks := [rank for rank, each in enumerate(others, start=1) if each[name] != first[name]]:
            raise RunError(f"the processes do not agree: {_processes(ranks)} a different {name} than process 0")


def compare_weights(method: nn.Module, step: int, device: torch.device) -> None:
    """Raise a RunError if the state dict of the method differs between processes; names a tensor and the processes.

    Not compared are running statistics of BatchNorm, which each process has of its own images, and sharded weights.
    """
    if world_size() == 1:
        return
    named = {
        name: tensor
        for name, tensor in method.state_dict().items()
        if not (name.endswith(RUNNING_STATISTICS) or isinstance(tensor, DTensor))
    }
    sums = [_checksum(tensor).to(device) for tensor in named.values()]
    row = torch.stack([torch.full((), step, device=device), *sums])
    columns = gather_rows(row[None]).T.tolist()  # the only wait for the device
    for name, column in zip(["number of steps", *named], columns, strict=True):
        if ranks := [rank for rank, value in enumerate(column) if value != column[0]]:
            raise RunError(
                f"step {step}: the processes have diverged: {_processes(ranks)} a different {name} than process 0. "
                "The last checkpoint may already differ; look for code that changes weights on one process only"
            )


def _checksum(tensor: Tensor) -> Tensor:
    """() int64: sum of the 32-bit words of a tensor, weighted by position, modulo 2^64."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    raw = nn.functional.pad(raw, (0, -raw.numel() % 4))
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    for index, words in enumerate(raw.view(torch.int32).split(CHUNK)):
        positions = torch.arange(index * CHUNK, index * CHUNK + len(words), device=raw.device)
        total += (words * (positions * 2 + 1)).sum()
    return total


def _processes(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:8])) + (" and more" if len(ranks) > 8 else "")
    return f"process {named} has" if len(ranks) == 1 else f"processes {named} have"
