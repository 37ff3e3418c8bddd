"""Checkpoints: safetensors and JSON in a folder that is whole or not there. No pickle.

    checkpoints/step-00001234/   model.safetensors  optimizer.safetensors  state.json  manifest.json
    checkpoints/latest           the newest one's name

Reading them, and what an optimizer's state is called in them; `sslkit.engine.checkpoint.writer` writes them.
"""

import hashlib
import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from sslkit.distributed.sharding import shard_like
from sslkit.engine.checkpoint.retention import NAME, by_step
from sslkit.engine.checkpoint.validation import GROUP, check_optimizer, check_state, check_weights
from sslkit.engine.optim import init_momentum_buffers
from sslkit.errors import UserError

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
MAX_MANIFEST_BYTES = 1_000_000
MAX_STATE_BYTES = 2**24


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        step: Updates made when it was saved.
        model: The method's state dict.
        optimizer: Tensors by ``parameter name/key``.
        state: What else the run needs: optimizer scalars, loss scale, and the recipe it was trained by.
        folder: Where it lies; None: nowhere.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    folder: Path | None = None


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest whole checkpoint in ``folder``.

    Returns:
        The checkpoint, or None where there is none at all, and a sentence for each broken one passed over.

    Raises:
        UserError: There are checkpoints and all are broken.
    """
    complaints: list[str] = []
    candidates = by_step(folder.glob("step-*"))[::-1]
    for candidate in candidates:
        try:
            return read_checkpoint(candidate), complaints
        except UserError as error:
            complaints.append(str(error))
    if candidates:
        raise UserError("no whole checkpoint left: " + "; ".join(complaints))
    return None, complaints


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint and check it against its manifest.

    Raises:
        UserError: A file is missing, torn, altered or not what a checkpoint has; names it.
    """
    for name, entry in _manifest(folder).items():
        if not _as_saved(folder / name, entry):
            raise UserError(f"{folder / name}: torn or altered since it was saved")
    file = folder / "state.json"
    try:
        if file.stat().st_size > MAX_STATE_BYTES:
            raise ValueError(f"more than {MAX_STATE_BYTES} bytes")
        state = json.loads(file.read_text(encoding="utf-8"))
        model = load_file(file := folder / "model.safetensors")
        optimizer = load_file(file := folder / "optimizer.safetensors")
    except (OSError, ValueError, RuntimeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{file}: not what a checkpoint has ({str(error)[:200]})") from error
    try:
        check_state(state)
    except UserError as error:
        raise UserError(f"{folder / 'state.json'}: {error}") from error
    named = NAME.fullmatch(folder.name)
    if named and int(named[1]) != state["step"]:
        raise UserError(f"{folder}: is of step {state['step']}, as its state.json says, and not of the one in its name")
    return Checkpoint(state["step"], model, optimizer, state, folder)


def _manifest(folder: Path) -> dict[str, Any]:
    """The entries of a manifest, which name all files of a checkpoint and none elsewhere."""
    file = folder / "manifest.json"
    try:
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError("far larger than one")
        files = json.loads(file.read_text(encoding="utf-8"))["files"]
        if not isinstance(files, dict):
            raise ValueError("its 'files' are no object")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}: checkpoint without a readable manifest ({str(error)[:200]})") from error
    for name in files:
        if name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise UserError(f"{file}: names {name!r:.100}, which is no file of this folder")
    if absent := [name for name in FILES if name not in files]:
        raise UserError(f"{file}: does not name {absent[0]}, without which there is no checkpoint")
    return files


def _as_saved(file: Path, entry: Any) -> bool:
    """Whether a plain file (no link, no pipe) has the manifest's size and sum; read only if it has the size."""
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode) or not isinstance(entry, dict) or entry.get("bytes") != status.st_size:
            return False
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == entry.get("sha256")
    except OSError:
        return False


def restore(checkpoint: Checkpoint, method: nn.Module, optimizer: Optimizer) -> None:
    """Put a checkpoint's tensors into a method and an optimizer built from the same recipe.

    Raises:
        UserError: They were built from another recipe, or no run saved this.
    """
    held = method.state_dict()
    scalars = checkpoint.state["optimizer"]
    try:
        check_weights(checkpoint.model, held)
        check_optimizer(checkpoint.optimizer, checkpoint.state, method, optimizer)
    except UserError as error:
        where = f"{checkpoint.folder}: " if checkpoint.folder else ""
        raise UserError(f"{where}{error}; move the checkpoint away to continue from the one before it") from error
    method.load_state_dict({name: shard_like(held[name], value) for name, value in checkpoint.model.items()})
    fused = bool(optimizer.defaults.get("fused"))
    tensors: dict[str, dict[str, Any]] = {}
    for key, tensor in checkpoint.optimizer.items():
        name, _, slot = key.rpartition("/")
        tensors.setdefault(name, {})[slot] = tensor
    optimizer.state.clear()  # of a course that is left, where the run goes back
    for name, param in method.named_parameters():
        slots = {slot: _beside(param, value, fused=fused) for slot, value in tensors.get(name, {}).items()}
        if slots or name in scalars:
            optimizer.state[param] = {**slots, **scalars.get(name, {})}
    init_momentum_buffers(optimizer)
    for index, group in enumerate(optimizer.param_groups):
        group.update(tensors.get(f"{GROUP}{index}", {}))


def _beside(param: Tensor, value: Tensor, *, fused: bool) -> Tensor:
    """A slot of the optimizer's as it keeps it: in the parameter's own order in memory, which fused updates rely on.

    Counts of steps stay on the host, but for those of a fused optimizer.
    """
    if value.shape != param.shape or not value.ndim:
        return value.to(param.device) if value.ndim or fused else value
    return torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(shard_like(param, value))


def flatten_optimizer(method: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by ``parameter/slot`` or ``group/slot`` (timm's LAMB counts steps there), and plain numbers.

    The tensors are the optimizer's own, not copies, and in parts where parameters are.
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


def without_state(method: nn.Module, optimizer: Optimizer) -> list[str]:
    """The trained parameters of which the optimizer remembers nothing, as they have had no gradient yet."""
    held = {param for group in optimizer.param_groups for param in group["params"]}
    known = {param for param, slots in optimizer.state.items() if any(value is not None for value in slots.values())}
    return [name for name, param in method.named_parameters() if param in held - known]
