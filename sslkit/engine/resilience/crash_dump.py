"""A crash dump: what a bad step was computed from, small enough to keep, so that `sslkit replay` can compute it again.

    capsules/step-00001234/   model.safetensors   capsule.json

It holds the weights before the step, with teacher and queue. It names the images without holding them: views depend on
(seed, epoch, sample, view) alone, and so does every other random draw. Names on disk are those of earlier versions.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sslkit.engine.state import MAX_COUNT, MAX_STEP, TrainingState
from sslkit.errors import UserError, first_line
from sslkit.files.atomic import atomic_folder, sha256_of, write_json, write_tensors
from sslkit.files.json_reader import read_json

FORMAT = 1
MAX_BYTES = 2**24  # of capsule.json
MAX_DUMPS = 5  # of a run, so that they do not fill the disk


class CrashFacts(BaseModel):
    """The content of ``capsule.json``."""

    format: Literal[1]
    step: int = Field(ge=0, lt=MAX_STEP)  # from 0
    problem: str = Field(alias="complaint")  # why the step was refused
    loss: float
    grad_norm: float
    rewinds: int = Field(ge=0, le=MAX_COUNT, alias="detour")
    processes: int
    device: str
    torch: str
    images: int = Field(ge=0, lt=MAX_STEP)
    recipe: dict[str, Any]
    sha256: str  # of the weights


def try_to_write_crash_dump(
    state: TrainingState, run_folder: Path, step: int, problem: str, loss: float, grad_norm: float
) -> str:
    """Write a crash dump of step ``step`` (from 0), which was refused because of ``problem``; the first process does.

    Returns:
        The folder of the dump, on the first process. Empty if there is none: the previous step was bad too, there are
        `MAX_DUMPS` already, the disk is full, or the weights are sharded.
    """
    folder = run_folder / "capsules" / f"step-{step:08d}"
    if state.recipe.train.shard or state.recovery.skipped or len(list(folder.parent.glob("step-*"))) >= MAX_DUMPS:
        return ""
    if not state.accelerator.is_main_process:
        return str(folder)
    facts = {
        "format": FORMAT,
        "step": step,
        "complaint": problem,
        "loss": repr(loss),  # JSON has no NaN
        "grad_norm": repr(grad_norm),
        "detour": state.recovery.rewinds,
        "processes": state.accelerator.num_processes,
        "device": state.accelerator.device.type,
        "torch": torch.__version__,
        "sample_ids": [sample for _, sample in next(iter(state.batches(step + 1).starting_at(step)))],
        "images": len(state.source),
        "recipe": state.recipe.as_tables(),
    }
    try:
        folder.parent.mkdir(exist_ok=True)
        with atomic_folder(folder) as aside:
            tensors, own = state.method.state_dict(), torch.contiguous_format
            weights = {name: tensor.detach().cpu().clone(memory_format=own) for name, tensor in tensors.items()}
            written = write_tensors(aside / "model.safetensors", weights)
            write_json(aside / "capsule.json", {**facts, "sha256": written["sha256"]})
    except OSError:
        return ""
    return str(folder)


def read_crash_dump(folder: Path) -> tuple[CrashFacts, dict[str, Tensor]]:
    """Read the facts and the weights of a crash dump; raise a UserError if it is none, or damaged."""
    weights = folder / "model.safetensors"
    try:
        facts = read_json(folder / "capsule.json", CrashFacts, MAX_BYTES)
        if weights.is_symlink() or not weights.is_file():
            raise ValueError("model.safetensors is not a regular file")
        if facts.sha256 != sha256_of(weights):
            raise UserError(f"{weights}: damaged or changed since it was written")
        return facts, load_file(weights)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        problem = f"{folder}: not a crash dump: {first_line(error)}; give a folder in capsules/ of a run"
        raise UserError(problem) from error
