"""Save checkpoints while training continues: copy the state to host memory, then write it in a background thread.

Order of a save: files in a temporary folder, each synced and read back; manifest; sync the folder; rename it; sync
``checkpoints``; replace ``latest``; remove old checkpoints; write the encoder in the same way.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from sslkit.distributed.sharding import full_tensor
from sslkit.engine.checkpoint.format import FORMAT, Checkpoint, flatten_optimizer, params_without_state
from sslkit.engine.checkpoint.retention import checkpoint_name, monitor_scores, reasons_to_keep, saved_steps
from sslkit.errors import RunError
from sslkit.files.atomic import atomic_folder, remove, replace_text, sync, write_json, write_tensors
from sslkit.methods import find_method
from sslkit.parts.adaptation.lora import merge_lora
from sslkit.publish.encoder_folder import encoder_config, write_encoder
from sslkit.recipe.resolve import Recipe

LICENSE = "apache-2.0"
LOGS = ("metrics.jsonl", "results.jsonl", "diagnostics.jsonl")
SLOW_SECONDS = 20.0  # launchers wait about 30 s after SIGTERM before they kill a run


class SaveError(RunError):
    """The state at the end of a run, or where it was asked to stop, could not be saved."""


def copy_to_host(source: dict[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to host memory, which ``buffers`` keeps for the next copy; pinned if they are on a GPU.

    A copy from a GPU is asynchronous, ordered by the current stream. Sharded tensors are gathered, one at a time; the
    other processes must call `full_tensor` in the same order.
    """
    for name in buffers.keys() - source.keys():
        del buffers[name]
    for name, tensor in source.items():
        held = buffers.get(name)
        if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
            held = buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        held.copy_(full_tensor(tensor.detach()), non_blocking=True)
    return buffers


class Saver:
    """Writes the checkpoints of a run and its encoder, one save at a time; waits for the last one on exit.

    A save that fails (disk full, quota, folder removed) logs a message, from the writing thread, and changes nothing on
    the disk; training continues. Checkpoints after ``start_step`` are removed by the first save: they are damaged or
    were discarded by a rewind. ``back_to`` is the step of the current rewind point. All processes but the first are not
    ``active``; they copy and write nothing.
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
        self.model, self.optimizer = dict[str, Tensor](), dict[str, Tensor]()  # in host memory, reused by every save
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self.writing: Future[str] | None = None
        self.failure, self.saved_at = "", time.monotonic()
        self.config = encoder_config(recipe, LICENSE) if active else {}
        self.steps_on_disk = {step for step in saved_steps(self.checkpoints) if step <= start_step}
        self.before_save: Callable[[], None] = lambda: None  # finishes what is written beside the checkpoints
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

        ``method`` and ``optimizer`` are unwrapped. ``state`` has more fields for ``state.json``, which must not change.
        """
        self.before_save()
        self.saved_at = time.monotonic()
        tensors, scalars = flatten_optimizer(method, optimizer)
        if not self.active:
            for tensor in (*method.state_dict().values(), *tensors.values()):
                full_tensor(tensor.detach())  # in the same order as the two copies below
            return
        self.wait()
        missing = params_without_state(method, optimizer)
        state = {"step": step, "optimizer": scalars, "without_state": missing, **state}
        model, moments = copy_to_host(method.state_dict(), self.model), copy_to_host(tensors, self.optimizer)
        params = [name for name, _ in method.named_parameters()]
        copied = _record_event(next(method.parameters()).device)
        self.writing = self.thread.submit(self._write, Checkpoint(step, model, moments, state), params, copied)

    def wait(self) -> str:
        """Wait for the save in progress; returns why the last save failed, or an empty string."""
        if self.writing is not None:
            self.failure = self.writing.result()
            self.writing = None
        return self.failure

    def complete(self, checkpoint: Checkpoint) -> None:
        """Write the encoder of a finished run that was killed just before; raise a SaveError if that fails."""
        if not self.active or _encoder_step(self.folder / "encoder") == str(checkpoint.step):
            return
        try:
            self._write_encoder(checkpoint)
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

    def _write(self, snapshot: Checkpoint, params: list[str], synchronize: Callable[[], None]) -> str:
        """Write a snapshot, in the background thread; returns why it failed, or an empty string.

        The tensors of ``params`` must be finite; buffers need not be. ``synchronize`` waits for the copies from a GPU.
        """
        started = time.monotonic()
        try:
            synchronize()
            _check_finite({name: snapshot.model[name] for name in params} | snapshot.optimizer)
            self._write_checkpoint(snapshot)
            self._prune()
            self._write_encoder(snapshot)
        except (OSError, SaveError) as error:
            failure = f"step {snapshot.step} could not be saved: {_reason(error)}"
            saved = saved_steps(self.checkpoints)
            newest = f"{checkpoint_name(max(saved))} is the newest checkpoint" if saved else "there is no checkpoint"
            self.log_message(f"WARNING: {failure}; {newest}")
            return failure
        if (seconds := time.monotonic() - started) > SLOW_SECONDS:
            slow = f"saving step {snapshot.step} took {seconds:.0f} s"
            self.log_message(f"WARNING: {slow}; launchers often kill a run 30 s after they ask it to stop")
        return ""

    def _write_checkpoint(self, snapshot: Checkpoint) -> None:
        for name in LOGS:  # first, so that no checkpoint is newer than the logs on the disk
            if (self.folder / name).is_file():
                sync(self.folder / name)
        self.checkpoints.mkdir(exist_ok=True)
        name = checkpoint_name(snapshot.step)
        with atomic_folder(self.checkpoints / name) as temporary:
            files = {
                "model.safetensors": write_tensors(temporary / "model.safetensors", snapshot.model),
                "optimizer.safetensors": write_tensors(temporary / "optimizer.safetensors", snapshot.optimizer),
                "state.json": write_json(temporary / "state.json", snapshot.state),
            }
            write_json(temporary / "manifest.json", {"format": FORMAT, "files": files})
        self.steps_on_disk.add(snapshot.step)
        if snapshot.state.get("course", {}).get("back_to") == snapshot.step:
            self.rewind_points.add(snapshot.step)
        replace_text(self.checkpoints / "latest", name + "\n")

    def _prune(self) -> None:
        kept = self.kept()
        for step in saved_steps(self.checkpoints) - kept.keys():
            remove(self.checkpoints / checkpoint_name(step))
        self.steps_on_disk &= kept.keys()

    def _write_encoder(self, snapshot: Checkpoint) -> None:
        prefix = f"{find_method(self.recipe.method_name).encoder_name}."
        model = {name.removeprefix(prefix): each for name, each in snapshot.model.items() if name.startswith(prefix)}
        tag = f"{self.recipe.method_name}_e{snapshot.step // self.steps_per_epoch}"
        write_encoder(self.config, tag, merge_lora(model), self.folder / "encoder", step=str(snapshot.step))


def _check_finite(tensors: dict[str, Tensor]) -> None:
    """Refuse a state that a resumed run would continue from with numbers that are not finite."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise SaveError(f"{name} is not finite")


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
