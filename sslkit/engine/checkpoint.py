"""Checkpoints: safetensors and JSON in a folder that is whole or not there. No pickle.

    checkpoints/step-00001234/   model.safetensors  optimizer.safetensors  state.json  manifest.json
    checkpoints/latest           the newest one's name

Reading them, and what an optimizer's state is called in them; `sslkit.engine.saver` writes them.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from sslkit.errors import UserError

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
GROUP = "param_groups."


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        step: Updates made when it was saved.
        model: The method's state dict.
        optimizer: Tensors by ``parameter name/key``.
        state: What else the run needs: optimizer scalars, loss scale, and the recipe it was trained by.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest whole checkpoint in ``folder``.

    Returns:
        The checkpoint, or None where there is none at all, and a sentence for each broken one passed over.

    Raises:
        UserError: There are checkpoints and all are broken.
    """
    complaints: list[str] = []
    candidates = sorted(folder.glob("step-*"), reverse=True)
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

    It may be a stranger's: only files of the three known names are opened, none of them through a link, and they hold
    numbers and text.

    Raises:
        UserError: A file is missing, torn, altered or not what its name says; names it.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        entries = {name: manifest["files"][name] for name in FILES}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}: checkpoint without a readable manifest ({_one_line(error)})") from error
    for name, entry in entries.items():
        if _checksum(folder / name) != entry:
            raise UserError(f"{folder / name}: torn or altered since it was saved")
    file = folder / "state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        step, _, _ = int(state["step"]), dict(state["optimizer"]), dict(state["recipe"])
        file = folder / "model.safetensors"
        model = load_file(file)
        file = folder / "optimizer.safetensors"
        return Checkpoint(step, model, load_file(file), state)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{file}: not a checkpoint's, though its manifest vouches for it: {_one_line(error)}"
        ) from error


def restore(checkpoint: Checkpoint, method: nn.Module, optimizer: Optimizer) -> None:
    """Put a checkpoint's tensors into a method and an optimizer built from the same recipe.

    Raises:
        UserError: They were built from another recipe.
    """
    try:
        method.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit this recipe: {str(error).splitlines()[-1]}") from error
    tensors: dict[str, dict[str, Any]] = {}
    for key, tensor in checkpoint.optimizer.items():
        name, _, slot = key.rpartition("/")
        tensors.setdefault(name, {})[slot] = tensor
    scalars = checkpoint.state["optimizer"]
    for name, param in method.named_parameters():
        slots = {slot: value.to(param.device) if value.ndim else value for slot, value in tensors.get(name, {}).items()}
        if slots or name in scalars:
            optimizer.state[param] = {**slots, **scalars.get(name, {})}
    for index, group in enumerate(optimizer.param_groups):
        group.update(tensors.get(f"{GROUP}{index}", {}))


def flatten_optimizer(method: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by ``parameter/slot`` or ``group/slot`` (timm's LAMB counts steps there), and plain numbers.

    The tensors are the optimizer's own, not copies.
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


def _checksum(file: Path) -> dict[str, Any]:
    """The manifest's entry of a file; nothing of one that is missing, cannot be read, or is a link."""
    try:
        if file.is_symlink():
            return {}
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": file.stat().st_size, "sha256": digest}
    except OSError:
        return {}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
