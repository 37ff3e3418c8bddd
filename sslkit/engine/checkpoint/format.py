"""Read checkpoints: folders of safetensors and JSON that are written atomically. No pickle.

    checkpoints/step-00001234/   model.safetensors  optimizer.safetensors  state.json  manifest.json
    checkpoints/latest           name of the newest

This module also maps optimizer state to names; `sslkit.engine.checkpoint.writer` writes checkpoints.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from sslkit.distributed.sharding import shard_like
from sslkit.engine.checkpoint.retention import NAME, checkpoint_name, saved_steps
from sslkit.engine.checkpoint.validation import GROUP, SavedState, check_optimizer, check_weights
from sslkit.engine.optim import init_momentum_buffers
from sslkit.errors import UserError, first_line
from sslkit.files.atomic import sha256_of
from sslkit.files.json_reader import read_json

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
MAX_MANIFEST_BYTES = 1_000_000
MAX_STATE_BYTES = 2**24


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    step: int  # number of updates
    model: dict[str, Tensor]  # state dict of the method
    optimizer: dict[str, Tensor]  # by ``parameter name/slot``
    state: dict[str, Any]  # content of ``state.json``; see `SavedState`
    folder: Path | None = None  # None if it was not read from the disk


class ManifestEntry(BaseModel):
    """Size and digest of a file of a checkpoint."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """The content of ``manifest.json``."""

    files: dict[str, ManifestEntry]


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest intact checkpoint in ``folder``, or None; with a message for each damaged one that was skipped.

    Raises:
        UserError: There are checkpoints, but all are damaged.
    """
    problems: list[str] = []
    for step in sorted(saved_steps(folder), reverse=True):
        try:
            return read_checkpoint(folder / checkpoint_name(step)), problems
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("no intact checkpoint left: " + "; ".join(problems))
    return None, problems


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint; raise a UserError that names the file if one is missing, invalid or not as in its manifest."""
    for name, entry in _manifest(folder).items():
        if not _matches(folder / name, entry):
            raise UserError(f"{folder / name}: damaged or changed since it was saved")
    file = folder / "state.json"
    try:
        read_json(file, SavedState, MAX_STATE_BYTES)
        state = json.loads(file.read_bytes())
        model = load_file(file := folder / "model.safetensors")
        optimizer = load_file(file := folder / "optimizer.safetensors")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{file}: not a valid checkpoint file: {first_line(error)}") from error
    named = NAME.fullmatch(folder.name)
    if named and int(named[1]) != state["step"]:
        raise UserError(f"{folder}: its state.json is of step {state['step']}, but its name is of another step")
    return Checkpoint(state["step"], model, optimizer, state, folder)


def _manifest(folder: Path) -> dict[str, ManifestEntry]:
    """Read the entries of a manifest; they must name all files of a checkpoint, and no file outside its folder."""
    file = folder / "manifest.json"
    try:
        files = read_json(file, Manifest, MAX_MANIFEST_BYTES).files
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: checkpoint without a readable manifest.json: {first_line(error)}") from error
    for name in files:
        if name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise UserError(f"{file}: names {name!r:.100}, which is not a file of this folder")
    if absent := [name for name in FILES if name not in files]:
        raise UserError(f"{file}: does not name {absent[0]}, which every checkpoint has")
    return files


def _matches(file: Path, entry: ManifestEntry) -> bool:
    """Whether a regular file has the size and SHA-256 of its manifest entry; it is read only if the size is right."""
    try:
        regular = file.is_file() and not file.is_symlink()
        return regular and file.stat().st_size == entry.bytes and sha256_of(file) == entry.sha256
    except OSError:
        return False


def restore(
    checkpoint: Checkpoint, method: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler | None = None
) -> None:
    """Load a checkpoint into what training changes; raise a UserError that names a tensor that does not fit.

    The loss scale is restored if the run has one now and had one when it was saved.
    """
    held = method.state_dict()
    scalars = checkpoint.state["optimizer"]
    try:
        check_weights(checkpoint.model, held)
        check_optimizer(checkpoint.optimizer, checkpoint.state, method, optimizer)
    except UserError as error:
        where = f"{checkpoint.folder}: " if checkpoint.folder else ""
        raise UserError(f"{where}{error}; move the checkpoint away to resume from an earlier one") from error
    method.load_state_dict({name: shard_like(held[name], value) for name, value in checkpoint.model.items()})
    fused = bool(optimizer.defaults.get("fused"))
    tensors: dict[str, dict[str, Any]] = {}
    for key, tensor in checkpoint.optimizer.items():
        name, _, slot = key.rpartition("/")
        tensors.setdefault(name, {})[slot] = tensor
    optimizer.state.clear()  # a run that is rewound has state
    for name, param in method.named_parameters():
        slots = {slot: _place_slot(param, value, fused=fused) for slot, value in tensors.get(name, {}).items()}
        if slots or name in scalars:
            optimizer.state[param] = {**slots, **scalars.get(name, {})}
    init_momentum_buffers(optimizer)
    for index, group in enumerate(optimizer.param_groups):
        group.update(tensors.get(f"{GROUP}{index}", {}))
    if scaler is not None and (saved := checkpoint.state.get("scaler")):
        scaler.load_state_dict(saved)


def _place_slot(param: Tensor, value: Tensor, *, fused: bool) -> Tensor:
    """Copy an optimizer slot to the device and memory format of its parameter, which fused updates require.

    Step counts stay on the CPU, except those of a fused optimizer.
    """
    if value.shape != param.shape or not value.ndim:
        return value.to(param.device) if value.ndim or fused else value
    return torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(shard_like(param, value))


def flatten_optimizer(method: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by ``parameter/slot`` or ``group/slot`` (timm's LAMB counts steps per group), and plain numbers.

    The tensors are not copied, and are sharded like their parameters.
    """
    names: dict[Tensor, str] = {param: name for name, param in method.named_parameters()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for param, slots in optimizer.state.items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{names[param]}/{slot}"] = value
            elif value is not None:
                scalars.setdefault(names[param], {})[slot] = value
    for index, group in enumerate(optimizer.param_groups):
        tensors |= {f"{GROUP}{index}/{slot}": value for slot, value in group.items() if isinstance(value, Tensor)}
    return tensors, scalars


def params_without_state(method: nn.Module, optimizer: Optimizer) -> list[str]:
    """The trained parameters without optimizer state, because they have had no gradient yet."""
    held = {param for group in optimizer.param_groups for param in group["params"]}
    known = {param for param, slots in optimizer.state.items() if any(value is not None for value in slots.values())}
    return [name for name, param in method.named_parameters() if param in held - known]
