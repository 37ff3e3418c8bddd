"""Check that all processes train the same model: at the start of a run, and every few steps."""

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sslkit.distributed.collectives import gather_objects, gather_rows, world_size
from sslkit.errors import RunError, UserError

Result = TypeVar("Result")

CHUNK = 1 << 22  # 32-bit words summed at a time, to bound the memory for large memory banks


def all_or_none(work: Callable[[], Result]) -> Result:
    """Call ``work`` on every process. If one raises a UserError, all do, so that none waits for it.

    Raises:
        UserError: The error of the lowest rank that had one.
    """
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


def compare_facts(facts: dict[str, Any], device: torch.device) -> None:
    """Stop if the processes were started with different recipes, data, checkpoints or versions.

    Args:
        facts: JSON values, by the names that the message uses.
        device: Device of the collectives.

    Raises:
        RunError: A fact differs; names it and the processes.
    """
    digests = [_hash_text(json.dumps(value, sort_keys=True)) for value in facts.values()]
    table = gather_rows(torch.tensor([digests], dtype=torch.int64, device=device)).cpu()
    for name, column in zip(facts, table.T, strict=True):
        if ranks := _differing(column):
            raise RunError(f"the processes do not agree: {_processes(ranks)} another {name} than process 0")


def compare_weights(method: nn.Module, step: int, device: torch.device) -> None:
    """Stop if the state dict of the method is not the same on all processes.

    Running statistics of BatchNorm are not compared, because each process has those of its own images. Sharded weights
    are not compared either.

    Raises:
        RunError: A tensor differs; names it, the step and the processes.
    """
    if world_size() == 1:
        return
    named = {
        name: tensor
        for name, tensor in method.state_dict().items()
        if not (_is_running(name) or isinstance(tensor, DTensor))
    }
    sums = [_checksum(tensor).to(device) for tensor in named.values()]
    table = gather_rows(torch.stack([torch.tensor(step, device=device), *sums])[None])
    for name, column in zip(["number of steps", *named], table.T, strict=True):
        if ranks := _differing(column):
            raise RunError(
                f"step {step}: the processes have drifted apart: {_processes(ranks)} another {name} than process 0. "
                "The last checkpoint may already differ; look for code that changes weights on one process only"
            )


def _is_running(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def _checksum(tensor: Tensor) -> Tensor:
    """() int64: sum of the 32-bit words of a tensor, weighted by position, modulo 2^64."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    raw = nn.functional.pad(raw, (0, -raw.numel() % 4))
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    for index, words in enumerate(raw.view(torch.int32).split(CHUNK)):
        positions = torch.arange(index * CHUNK, index * CHUNK + len(words), device=raw.device)
        total += (words * (positions * 2 + 1)).sum()
    return total


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def _differing(column: Tensor) -> list[int]:
    """The ranks whose value differs from that of rank 0."""
    return torch.nonzero(column != column[0]).flatten().tolist()


def _processes(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:8])) + (" and more" if len(ranks) > 8 else "")
    return f"process {named} has" if len(ranks) == 1 else f"processes {named} have"
