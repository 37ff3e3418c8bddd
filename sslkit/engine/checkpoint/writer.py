"""Save checkpoints while training continues: copy the state to host memory, then write it in a background thread.

Order of a save: files in a temporary folder, each synced and read back; manifest; sync the folder; rename it; sync
``checkpoints``; replace ``latest``; remove old checkpoints; write the encoder in the same way.
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
from sslkit.engine.checkpoint.format import FORMAT, flatten_optimizer, params_without_state
from sslkit.engine.checkpoint.retention import checkpoint_name, monitor_scores, reasons_to_keep, saved_steps
from sslkit.errors import RunError
from sslkit.files.atomic import atomic_folder, remove, replace_text, sync, write_file, write_json, write_tensors
from sslkit.methods import find_method
from sslkit.publish.encoder_folder import encoder_config, write_encoder
from sslkit.recipe.resolve import Recipe

LICENSE = "apache-2.0"
LOGS = ("metrics.jsonl", "results.jsonl", "diagnostics.jsonl")
SLOW_SECONDS = 20.0  # launchers wait about 30 s after SIGTERM before they kill a run


class SaveError(RunError):
    """The state at the end of a run, or where it was asked to stop, could not be saved."""


class HostCopy:
    """Tensors in host memory, reused by every save; pinned if they are copied from a GPU."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def fill(self, source: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy ``source``. A copy from a GPU is asynchronous, ordered by the current stream.

        Sharded tensors are gathered, one at a time; the other processes must call `full_tensor` in the same order.
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
    """The state of a run at the end of a step, in host memory.

    Attributes:
        step: Number of updates.
        model: State dict of the method.
        optimizer: Tensors by ``parameter name/slot``.
        state: Content of ``state.json``.
        trained: Names in ``model`` that must be finite: parameters, not buffers.
        rewind_point: Whether the run can be rewound to it.
        synchronize: Waits for the copies from a GPU.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: str
    trained: list[str]
    rewind_point: bool
    synchronize: Callable[[], None]

    def not_finite(self) -> str:
        """The first parameter or optimizer tensor that is not finite, or an empty string."""
        tensors = {name: self.model[name] for name in self.trained} | self.optimizer
        return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), "")


class Saver:
    """Writes the checkpoints of a run and its encoder, one save at a time.

    A save that fails (disk full, quota, folder removed) logs a message and changes nothing on the disk; training
    continues. On exit, the context manager waits for the save in progress.

    Args:
        folder: Run folder, locked by `hold_folder`.
        recipe: Says which checkpoints are kept and what the encoder is.
        steps_per_epoch: Number of global batches per epoch.
        start_step: Number of updates so far. Checkpoints of later steps are removed by the first save: they are damaged
            or were discarded by a rewind.
        log_message: Called with each message, from the writing thread.
        back_to: Step of the current rewind point, if there is one; see `sslkit.engine.resilience.rewind`.
        active: False on all processes but the first, which copy and write nothing.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        steps_per_epoch: int,
        start_step: int,
        log_message: Callable[[str], None],
        *,
        back_to: int | None = None,
        active: bool = True,
    ) -> None:
        self.folder, self.recipe, self.log_message, self.active = folder, recipe, log_message, active
        self.checkpoints = folder / "checkpoints"
        self.steps_per_epoch = steps_per_epoch
        self.model, self.optimizer = HostCopy(), HostCopy()
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self.writing: Future[str] | None = None
        self.failure = ""
        self.config = encoder_config(recipe, LICENSE) if active else {}
        self.steps_on_disk = {step for step in saved_steps(self.checkpoints) if step <= start_step}
        self.rewind_points = {step for step in self.steps_on_disk if step == back_to}

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            self.wait()
        finally:
            self.thread.shutdown()

    def save(self, step: int, method: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Copy the state and start to write it. Waits first if an earlier save is still being written.

        Args:
            step: Number of updates.
            method: The unwrapped method.
            optimizer: Its optimizer.
            state: More fields for ``state.json``, as plain data.
        """
        tensors, scalars = flatten_optimizer(method, optimizer)
        if not self.active:
            for tensor in (*method.state_dict().values(), *tensors.values()):
                full_tensor(tensor.detach())  # in the same order as the two copies below
            return
        self.wait()
        missing = params_without_state(method, optimizer)
        text = json.dumps({"step": step, "optimizer": scalars, "without_state": missing, **state}, indent=1)
        model = self.model.fill(method.state_dict())
        moments = self.optimizer.fill(tensors)
        trained = [name for name, _ in method.named_parameters() if name in model]
        rewind_point = state.get("course", {}).get("back_to") == step
        synchronize = _record_event(next(method.parameters()).device)
        snapshot = Snapshot(step, model, moments, text, trained, rewind_point, synchronize)
        self.writing = self.thread.submit(self._write, snapshot)

    def wait(self) -> str:
        """Wait for the save in progress; returns why the last save failed, or an empty string."""
        if self.writing is not None:
            self.failure = self.writing.result()
            self.writing = None
        return self.failure

    def complete(self, step: int, model: dict[str, Tensor]) -> None:
        """Write the encoder of a finished run that was killed after its last checkpoint, before the encoder.

        Args:
            step: Number of updates.
            model: State dict of the method, from the checkpoint.

        Raises:
            SaveError: The encoder cannot be written.
        """
        if not self.active or _encoder_step(self.folder / "encoder") == str(step):
            return
        try:
            self._write_encoder(step, model)
        except OSError as error:
            raise SaveError(f"the encoder could not be written: {_reason(error)}") from error

    def kept(self) -> dict[int, str]:
        """The steps whose checkpoints are kept, and why."""
        rules = self.recipe.checkpoint
        scores = monitor_scores(self.folder / "results.jsonl", rules.keep_best) if rules.keep_best else {}
        reasons = reasons_to_keep(self.steps_on_disk, rules, self.steps_per_epoch, scores)
        if self.recipe.guard.policy == "skip" and (points := self.rewind_points & self.steps_on_disk):
            newest = max(points)
            reasons[newest] = ", ".join(filter(None, [reasons.get(newest, ""), "rewind point"]))
        return dict(sorted(reasons.items()))

    def rewind(self, step: int) -> None:
        """Discard checkpoints after ``step``; the next save removes them."""
        self.steps_on_disk = {saved for saved in self.steps_on_disk if saved <= step}

    def _write(self, snapshot: Snapshot) -> str:
        """Write a snapshot, in the background thread; returns why it failed, or an empty string."""
        started = time.monotonic()
        try:
            snapshot.synchronize()
            if name := snapshot.not_finite():
                raise SaveError(f"{name} is not finite")  # a resumed run would continue from it
            self._write_checkpoint(snapshot)
            self._prune()
            self._write_encoder(snapshot.step, snapshot.model)
        except (OSError, SaveError) as error:
            failure = f"step {snapshot.step} could not be saved: {_reason(error)}"
            saved = saved_steps(self.checkpoints)
            newest = f"{checkpoint_name(max(saved))} is the newest checkpoint" if saved else "there is no checkpoint"
            self.log_message(f"WARNING: {failure}; {newest}")
            return failure
        seconds = time.monotonic() - started
        if seconds > SLOW_SECONDS:
            self.log_message(
                f"WARNING: saving step {snapshot.step} took {seconds:.0f} s; launchers often kill a run 30 s after "
                "they ask it to stop"
            )
        return ""

    def _write_checkpoint(self, snapshot: Snapshot) -> None:
        for name in LOGS:  # first, so that no checkpoint is newer than the logs on the disk
            if (self.folder / name).is_file():
                sync(self.folder / name)
        self.checkpoints.mkdir(exist_ok=True)
        name = checkpoint_name(snapshot.step)
        with atomic_folder(self.checkpoints / name) as temporary:
            files = {
                "model.safetensors": write_tensors(temporary / "model.safetensors", snapshot.model),
                "optimizer.safetensors": write_tensors(temporary / "optimizer.safetensors", snapshot.optimizer),
                "state.json": write_file(temporary / "state.json", [snapshot.state.encode()]),
            }
            write_json(temporary / "manifest.json", {"format": FORMAT, "files": files})
        self.steps_on_disk.add(snapshot.step)
        if snapshot.rewind_point:
            self.rewind_points.add(snapshot.step)
        replace_text(self.checkpoints / "latest", name + "\n")

    def _prune(self) -> None:
        kept = self.kept()
        for step in saved_steps(self.checkpoints) - kept.keys():
            remove(self.checkpoints / checkpoint_name(step))
        self.steps_on_disk &= kept.keys()

    def _write_encoder(self, step: int, model: dict[str, Tensor]) -> None:
        prefix = f"{find_method(self.recipe.method_name).encoder_name}."
        state = {name.removeprefix(prefix): tensor for name, tensor in model.items() if name.startswith(prefix)}
        tag = f"{self.recipe.method_name}_e{step // self.steps_per_epoch}"
        write_encoder(self.config, tag, state, self.folder / "encoder", step=str(step))


def _record_event(device: torch.device) -> Callable[[], None]:
    """Record an event on the current stream; returns a function that waits for it."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def _encoder_step(folder: Path) -> str:
    """The step of the encoder in a folder, from the header of its weights; empty if there is none."""
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            return str((file.metadata() or {}).get("step"))
    except (OSError, SafetensorError):
        return ""


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error)
