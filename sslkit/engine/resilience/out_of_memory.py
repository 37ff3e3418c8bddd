"""What to set when memory runs out: the largest slice or batch that fits, by an estimate."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from sslkit.command_line import free_folder, same_command
from sslkit.distributed.sharding import local_shard
from sslkit.engine.cost.step_cost import count_step
from sslkit.engine.optim import OPTIMIZER_COPIES
from sslkit.engine.runtime.precision import chosen_precision, gpu_has_bf16
from sslkit.engine.setup import check_batch_split
from sslkit.engine.state import TrainingState
from sslkit.errors import UserError, first_line, is_out_of_memory
from sslkit.files.run_reader import RunReader
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.text import join

GIB = 1 << 30
USABLE = 0.85  # of the memory: the rest is for workspaces and fragmentation
OTHERS = 2 * GIB  # memory of a GPU that is not ours, above which other programs use it


class OutOfMemoryError(UserError):
    """A step does not fit in the memory of the device; the message says what to set."""


@contextmanager
def explain_set_up(device: torch.device) -> Iterator[None]:
    """Turn a lack of memory while the model is set up into one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"{_out_of(device)} before the first step, {_used(device, error)}; weights, teacher, queue and optimizer "
            "alone do not fit: take a smaller [backbone] name, or a smaller [method] queue_size or hidden_dim"
        ) from error


def explain_step(state: TrainingState, error: BaseException, folder: Path | None = None) -> OutOfMemoryError:
    """The error of a training step that did not fit, with what to set.

    ``folder`` is the run's: the message then ends in a command, which continues from a checkpoint if there is one.
    """
    device = state.accelerator.device
    if "DataLoader worker" in str(error):
        return OutOfMemoryError(f"out of memory in a data worker at step {state.step}: set a smaller data.workers")
    options = _smaller_batches(state) | _other_options(state)
    advice = "take a smaller [backbone] name, or more processes"
    if options:
        advice = "set " + join([f"{key}{effect}" for key, effect in options.items()], "or")
    if folder is not None and options:
        resume = str(folder) if RunReader(folder).latest_step() else ""
        command = same_command(output=free_folder(folder), resume=resume, overrides=list(options)[:1])
        advice += f", such as: {command}"
    return OutOfMemoryError(f"{_out_of(device)} at step {state.step}, {_used(device, error)}; {advice}")


def explain_evaluation(state: TrainingState, error: BaseException, bank: int | None) -> OutOfMemoryError:
    """The error of an evaluation that did not fit; ``bank`` is the number of images of the kNN's, if there is one."""
    device = state.accelerator.device
    advice = "set monitor.diagnose_every=0"
    if bank:
        advice = (
            f"set monitor.max_train={max(bank // 2, 1)} for a smaller bank, or monitor.every_epochs=0 and measure with "
            "`sslkit eval knn` afterwards"
        )
    return OutOfMemoryError(
        f"{_out_of(device)} in the evaluation at step {state.step}, {_used(device, error)}; {advice}"
    )


def fitting_images(state: TrainingState, available: float) -> int:
    """How many images of this process fit at once in ``available`` bytes, with weights, gradients and optimizer."""
    recipe, accelerator = state.recipe, state.accelerator
    local: int = recipe.train.batch_size // accelerator.num_processes
    try:
        cost = count_step(recipe, local, low_precision=chosen_precision(recipe) != "no")
    except Exception:  # a method of others may read values that fake tensors do not have
        return local
    images: float = max(USABLE * available - held_bytes(state), 0) * local / max(cost.activation_bytes, 1)
    return int(images)


def held_bytes(state: TrainingState) -> int:
    """Memory of weights, teacher, queue, gradients and optimizer on this process, without activations."""
    method = state.method
    tensors = [*method.parameters(), *method.buffers()]
    trained = [param for param in method.parameters() if param.requires_grad]
    return _bytes(tensors) + (1 + OPTIMIZER_COPIES[state.recipe.optim.name]) * _bytes(trained)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(local_shard(tensor).numel() * int(tensor.element_size()) for tensor in tensors)


def _smaller_batches(state: TrainingState) -> dict[str, str]:
    """The largest slice and the largest batch that should fit: keys with values, and their effect."""
    train, processes = state.recipe.train, state.accelerator.num_processes
    local = train.batch_size // processes
    at_once = train.micro_batch or local
    fitting = at_once // 2
    if (available := _available(state.accelerator.device)) is not None and not train.activation_checkpointing:
        fitting = min(fitting, fitting_images(state, available))
    divisors = [size for size in range(local // 2, 0, -1) if local % size == 0]
    slices = [size for size in divisors if size < at_once and _splits(state, micro_batch=size)]
    batches = [size * processes for size in divisors if _splits(state, batch_size=size * processes)]
    found = {}
    if slices:
        size = next((size for size in slices if size <= fitting), slices[-1])
        same = not has_batch_norm(state.method.backbone) or state.recipe.adapt.keeps_statistics
        effect = "the same loss" if same else f"BatchNorm over {size} images each"
        found[f"train.micro_batch={size}"] = f" ({effect}, a third slower)"
    if batches and not train.micro_batch:
        found[f"train.batch_size={next((b for b in batches if b <= fitting * processes), batches[-1])}"] = ""
    return found


def _splits(state: TrainingState, **train: int) -> bool:
    """Whether the batch splits into processes, slices and BN groups with other values in ``[train]``."""
    recipe, method = state.recipe, state.method
    changed = replace(recipe, train=recipe.train.model_copy(update=train))
    groups = method.bn_groups
    if "micro_batch" in train and has_batch_norm(method.backbone) and not recipe.adapt.keeps_statistics:
        method.bn_groups = max(recipe.train.batch_size // train["micro_batch"], groups)
    try:
        check_batch_split(changed, method, state.accelerator.num_processes)
    except UserError:
        return False
    finally:
        method.bn_groups = groups
    return True


def _other_options(state: TrainingState) -> dict[str, str]:
    """Other keys that save memory."""
    on_gpu, found = state.accelerator.device.type == "cuda", {}
    if on_gpu and chosen_precision(state.recipe) == "no" and gpu_has_bf16():
        found["train.precision=bf16"] = ""
    if not state.recipe.train.activation_checkpointing and hasattr(state.method.backbone, "set_grad_checkpointing"):
        found["train.activation_checkpointing=true"] = ""
    return found


def _available(device: torch.device) -> float | None:
    """Memory of the device that this process has or could have; None if it is not known."""
    if device.type != "cuda":
        return None
    free, _total = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device))


def _out_of(device: torch.device) -> str:
    return "out of GPU memory" if device.type == "cuda" else "out of memory"


def _used(device: torch.device, error: BaseException) -> str:
    """How much is used; on a GPU also by others."""
    if device.type != "cuda":
        return f"of this machine ({first_line(error, 120)})"
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    by_others = f" ({others / GIB:.1f} by other programs)" if others > OTHERS else ""
    return f"where {(total - free) / GIB:.1f} of {total / GIB:.1f} GiB are used{by_others}"
