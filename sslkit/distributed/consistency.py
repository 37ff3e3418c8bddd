"""Do all processes train the same thing? Compared at the start and now and then, so that a drift is found by name."""

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

CHUNK = 1 << 22  # words summed at a time, so that a memory bank needs no copy of its size


def all_or_none(work: Callable[[], Result]) -> Result:
    """Do something on every process; what one of them refuses, all refuse, and none waits for it in vain.

    Raises:
        UserError: Of the first process that had one.
    """
    result: Result
    refusal = None
    try:
        result = work()
    except UserError as error:
        refusal = str(error)
    for sentence in gather_objects(refusal):
        if sentence is not None:
            raise UserError(sentence)
    return result


def compare_facts(facts: dict[str, Any], device: torch.device) -> None:
    """Stop if the processes were started with different recipes, data, checkpoints or versions.

    Args:
        facts: JSON-able, by the words a sentence would use.
        device: Where collectives take their tensors.

    Raises:
        RunError: Names what differs, and on which processes.
    """
    table = _gathered([_hash_text(json.dumps(value, sort_keys=True)) for value in facts.values()], device)
    for name, column in zip(facts, table.T, strict=True):
        if odd := _odd_ones(column):
            raise RunError(f"the processes do not agree: {_processes(odd)} another {name} than process 0")


def compare_weights(method: nn.Module, step: int, device: torch.device) -> None:
    """Stop if weights, teacher or queue are not the same on all processes.

    Left out are BatchNorm's running statistics, as every process has those of its own images, and weights in parts,
    which nobody else has.

    Raises:
        RunError: Names the step, the processes and the first tensor that differs.
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
        if odd := _odd_ones(column):
            raise RunError(
                f"step {step}: the processes have drifted apart: {_processes(odd)} another {name} than process 0. "
                "The last checkpoint may already hold it; look for code that changes weights on one process only"
            )


def _is_running(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def _checksum(tensor: Tensor) -> Tensor:
    """() int64: the bits of a tensor, each word weighted by its place, modulo 2^64."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    raw = nn.functional.pad(raw, (0, -raw.numel() % 4))
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    for index, words in enumerate(raw.view(torch.int32).split(CHUNK)):
        places = torch.arange(index * CHUNK, index * CHUNK + len(words), device=raw.device)
        total += (words * (places * 2 + 1)).sum()
    return total


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def _gathered(numbers: list[int], device: torch.device) -> Tensor:
    """(world size, len(numbers)) int64."""
    return gather_rows(torch.tensor([numbers], dtype=torch.int64, device=device)).cpu()


def _odd_ones(column: Tensor) -> list[int]:
    """The processes whose number is not the first one's."""
    return torch.nonzero(column != column[0]).flatten().tolist()


def _processes(odd: list[int]) -> str:
    named = ", ".join(map(str, odd[:8])) + (" and more" if len(odd) > 8 else "")
    return f"process {named} has" if len(odd) == 1 else f"processes {named} have"
