"""A crash dump: what a bad step was computed from, small enough to keep, so that `sslkit replay` can compute it again.

    capsules/step-00001234/   model.safetensors   capsule.json

It holds the weights before the step, with teacher and queue. It names the images without holding them: views depend on
(seed, epoch, sample, view) alone, and so does every other random draw.
"""

import json
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sslkit.engine.state import TrainingState
from sslkit.errors import UserError
from sslkit.files.atomic import atomic_folder, sha256_of, write_json, write_tensors

FORMAT = 1
MAX_COUNT = 2**53
MAX_DUMPS = 5  # of a run, so that they do not fill the disk


def try_to_write_crash_dump(
    state: TrainingState, run_folder: Path, step: int, problem: str, loss: float, grad_norm: float
) -> str:
    """Write a crash dump of a step that was refused; the first process does.

    Args:
        state: The weights are those before the step.
        run_folder: Where ``capsules/`` is.
        step: Number of the step, from 0.
        problem: Why it was refused.
        loss: Loss of the step.
        grad_norm: Gradient norm of the step.

    Returns:
        The folder of the dump, on every process. Empty if there is none: the previous step was bad too, there are
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


def read_crash_dump(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the facts and the weights of a crash dump.

    Raises:
        UserError: The folder is no crash dump, or it is damaged.
    """
    try:
        for name in ("capsule.json", "model.safetensors"):
            if not (folder / name).exists():
                raise UserError(f"{folder}: not a crash dump (no {name}); give a folder in capsules/ of a run")
            if not stat.S_ISREG((folder / name).lstat().st_mode):
                raise ValueError(f"{name} is not a regular file")
        facts = json.loads((folder / "capsule.json").read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise UserError(f"{folder}: a crash dump of format {facts['format']!r}; this version reads {FORMAT}")
        if facts["sha256"] != sha256_of(folder / "model.safetensors"):
            raise UserError(f"{folder / 'model.safetensors'}: damaged or changed since it was written")
        _check_facts(facts)
        return facts, load_file(folder / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: not a crash dump ({type(error).__name__}: {str(error)[:200]})") from error


def _check_facts(facts: dict[str, Any]) -> None:
    """Raise a ValueError, KeyError or TypeError if facts are missing, or not what a run writes."""
    types = {"recipe": dict, "device": str, "torch": str, "processes": int, "step": int, "images": int}
    for name, kind in {**types, "detour": int, "complaint": str}.items():
        if not isinstance(facts[name], kind):
            raise ValueError(f"{name} cannot be {facts[name]!r:.50}")
    if not all(0 <= facts[name] < MAX_COUNT for name in ("step", "images", "detour")):
        raise ValueError("step, images or detour is out of range")
    for name in ("loss", "grad_norm"):
        float(facts[name])
