"""Saving while training goes on: a copy in host memory at a step's end, written by one thread in the background.

The order of a save: files aside, each synced and read back; manifest; folder synced; renamed; ``checkpoints`` synced;
``latest`` moved; only then are older checkpoints removed, and the encoder is written in the same way.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from sslkit.distributed.sharding import full_tensor
from sslkit.engine.checkpoint.format import FORMAT, flatten_optimizer, without_state
from sslkit.engine.checkpoint.retention import checkpoint_name, monitor_scores, reasons_to_keep, saved_steps
from sslkit.errors import RunError
from sslkit.files.atomic import atomic_folder, remove, replace_text, sync, write_file, write_json, write_tensors
from sslkit.methods import find_method
from sslkit.publish.encoder_folder import encoder_config, write_encoder
from sslkit.recipe.resolve import Recipe

LICENSE = "apache-2.0"
JOURNALS = ("metrics.jsonl", "results.jsonl", "diagnostics.jsonl")
SLOW_SECONDS = 20.0  # launchers give about 30 between asking a run to stop and ending it


class SaveError(RunError):
    """What had to be on the disk is not: the last state of a run, or the one it was asked to stop at."""


class HostCopy:
    """Tensors in host memory, filled anew by each save so that memory stays flat; pinned where they come from a GPU."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def fill(self, source: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy ``source``; from a GPU the copy is on its way, in the order of the current stream, when this returns.

        What is in parts is made whole, one tensor at a time; the other processes do their share by `whole`.
        """
        for name in self.tensors.keys() - source.keys():
            del self.tensors[name]
        for name, tensor in source.items():
            held = self.tensors.get(name)
            if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
                held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self.tensors[name] = held
            held.copy_(full_tensor(tensor.detach()), non_blocking=True)
        return self.tensors


@dataclass(frozen=True)
class Snapshot:
    """The run as it was at the end of a step, in host memory.

    Attributes:
        step: Updates made.
        model: The method's state dict.
        optimizer: Tensors by ``parameter name/slot``.
        state: What else the run needs, as JSON.
        trained: Names in ``model`` that must be finite: parameters, not buffers.
        rewind_point: Whether the run may go back to it.
        arrived: Waits until the copies from a GPU have.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: str
    trained: list[str]
    rewind_point: bool
    arrived: Callable[[], None]

    def not_finite(self) -> str:
        """The first parameter or optimizer tensor that is not finite, or an empty string."""
        tensors = {name: self.model[name] for name in self.trained} | self.optimizer
        return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), "")


class Saver:
    """Writes a run's checkpoints and its encoder, one save at a time.

    A save that fails (disk full, quota, folder gone) is said, each time, and changes nothing on the disk; training goes
    on. As a context manager it waits for the save in progress on leaving.

    Args:
        folder: Run folder, held by `hold_folder`.
        recipe: Says what stays and what the encoder is.
        steps_per_epoch: Whole global batches in the data.
        start_step: Updates made before; checkpoints of later ones, broken or of a course that was left, go with the
            first save.
        say: Told each sentence, from the writing thread.
        back_to: The checkpoint that the run may go back to, if it has one; see `sslkit.engine.resilience.rewind`.
        active: False on all processes but the first: then nothing is copied or written.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        steps_per_epoch: int,
        start_step: int,
        say: Callable[[str], None],
        *,
        back_to: int | None = None,
        active: bool = True,
    ) -> None:
        self.folder, self.recipe, self.say, self.active = folder, recipe, say, active
        self.checkpoints = folder / "checkpoints"
        self.steps_per_epoch = steps_per_epoch
        self.model, self.optimizer = HostCopy(), HostCopy()
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self.writing: Future[str] | None = None
        self.failure = ""
        self.config = encoder_config(recipe, LICENSE) if active else {}
        self.course = {step for step in saved_steps(self.checkpoints) if step <= start_step}
        self.rewind_points = {step for step in self.course if step == back_to}

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            self.wait()
        finally:
            self.thread.shutdown()

    def save(self, step: int, method: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Copy the run's state and start to write it; waits while an earlier save is still being written.

        Args:
            step: Updates made.
            method: Unwrapped method: student, teacher, queue.
            optimizer: Its optimizer.
            state: Plain data for ``state.json``: what a resumed run needs beside tensors.
        """
        tensors, scalars = flatten_optimizer(method, optimizer)
        if not self.active:
            for tensor in (*method.state_dict().values(), *tensors.values()):
                full_tensor(tensor.detach())  # in the order of the two copies below
            return
        self.wait()
        missing = without_state(method, optimizer)
        text = json.dumps({"step": step, "optimizer": scalars, "without_state": missing, **state}, indent=1)
        model = self.model.fill(method.state_dict())
        moments = self.optimizer.fill(tensors)
        trained = [name for name, _ in method.named_parameters() if name in model]
        rewind_point = state.get("course", {}).get("back_to") == step
        arrived = _mark(next(method.parameters()).device)
        snapshot = Snapshot(step, model, moments, text, trained, rewind_point, arrived)
        self.writing = self.thread.submit(self._write, snapshot)

    def wait(self) -> str:
        """Wait until nothing is being written.

        Returns:
            Why the last save failed; empty if it did not.
        """
        if self.writing is not None:
            self.failure = self.writing.result()
            self.writing = None
        return self.failure

    def complete(self, step: int, model: dict[str, Tensor]) -> None:
        """Write the encoder of a finished run, if it was killed between its last checkpoint and that.

        Args:
            step: Updates made.
            model: The method's state dict, of that checkpoint.

        Raises:
            SaveError: It cannot be written.
        """
        if not self.active or _encoder_step(self.folder / "encoder") == str(step):
            return
        try:
            self._write_encoder(step, model)
        except OSError as error:
            raise SaveError(f"the encoder could not be written: {_reason(error)}") from error

    def kept(self) -> dict[int, str]:
        """The checkpoints that stay, and why."""
        rules = self.recipe.checkpoint
        scores = monitor_scores(self.folder / "results.jsonl", rules.keep_best) if rules.keep_best else {}
        reasons = reasons_to_keep(self.course, rules, self.steps_per_epoch, scores)
        if self.recipe.guard.policy == "skip" and (points := self.rewind_points & self.course):
            newest = max(points)
            reasons[newest] = ", ".join(filter(None, [reasons.get(newest, ""), "to go back to"]))
        return dict(sorted(reasons.items()))

    def go_back(self, step: int) -> None:
        """Count later checkpoints as of a course that was left: they go with the next save."""
        self.course = {each for each in self.course if each <= step}

    def _write(self, snapshot: Snapshot) -> str:
        """Write a snapshot, in the saver's thread; returns why it could not be, if so."""
        started = time.monotonic()
        try:
            snapshot.arrived()
            if name := snapshot.not_finite():
                raise SaveError(f"{name} is not finite")  # never on the disk, where it would be taken for a good state
            self._write_checkpoint(snapshot)
            self._prune()
            self._write_encoder(snapshot.step, snapshot.model)
        except (OSError, SaveError) as error:
            failure = f"step {snapshot.step} could not be saved: {_reason(error)}"
            there = saved_steps(self.checkpoints)
            newest = f"{checkpoint_name(max(there))} is the newest checkpoint" if there else "there is no checkpoint"
            self.say(f"WARNING: {failure}; {newest}")
            return failure
        seconds = time.monotonic() - started
        if seconds > SLOW_SECONDS:
            self.say(
                f"WARNING: saving step {snapshot.step} took {seconds:.0f} s; a run that is asked to stop often has 30 s"
            )
        return ""

    def _write_checkpoint(self, snapshot: Snapshot) -> None:
        for name in JOURNALS:  # a checkpoint never outlives the lines that lead to it
            if (self.folder / name).is_file():
                sync(self.folder / name)
        self.checkpoints.mkdir(exist_ok=True)
        name = checkpoint_name(snapshot.step)
        with atomic_folder(self.checkpoints / name) as aside:
            files = {
                "model.safetensors": write_tensors(aside / "model.safetensors", snapshot.model),
                "optimizer.safetensors": write_tensors(aside / "optimizer.safetensors", snapshot.optimizer),
                "state.json": write_file(aside / "state.json", [snapshot.state.encode()]),
            }
            write_json(aside / "manifest.json", {"format": FORMAT, "files": files})
        self.course.add(snapshot.step)
        if snapshot.rewind_point:
            self.rewind_points.add(snapshot.step)
        replace_text(self.checkpoints / "latest", name + "\n")

    def _prune(self) -> None:
        stay = self.kept()
        for step in saved_steps(self.checkpoints) - stay.keys():
            remove(self.checkpoints / checkpoint_name(step))
        self.course &= stay.keys()

    def _write_encoder(self, step: int, model: dict[str, Tensor]) -> None:
        prefix = f"{find_method(self.recipe.method_name).encoder_name}."
        state = {name.removeprefix(prefix): tensor for name, tensor in model.items() if name.startswith(prefix)}
        tag = f"{self.recipe.method_name}_e{step // self.steps_per_epoch}"
        write_encoder(self.config, tag, state, self.folder / "encoder", step=str(step))


def _mark(device: torch.device) -> Callable[[], None]:
    """A mark in the device's order of work, as a function that waits for it."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def _encoder_step(folder: Path) -> str:
    """Which step's encoder lies there, as written in the header of its weights."""
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            return str((file.metadata() or {}).get("step"))
    except (OSError, SafetensorError):
        return ""


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error)
