"""A capsule: all that a bad step was computed from, small enough to keep, to compute it again at a desk.

    capsules/step-00001234/   model.safetensors   capsule.json

The images are not in it but their keys are: views are a function of (seed, epoch, sample, view), and so is every other
draw. The weights are those before the step, with teacher and queue.
"""

import json
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sslkit.data.order.epoch_order import OrderPlan
from sslkit.data.order.sampler import GlobalBatchSampler
from sslkit.engine.state import Training
from sslkit.errors import UserError
from sslkit.files.atomic import sha256_of, whole_folder, write_json, write_tensors
from sslkit.recipe.resolve import Recipe

FORMAT = 1
MAX_COUNT = 2**53
MOST = 5  # capsules of a run; a bad night must not fill the disk


def try_to_write_capsule(training: Training, step: int, complaint: str, loss: float, grad_norm: float) -> str:
    """Write a capsule of a step that was not taken; the first process does.

    Returns:
        Its folder, on every process; empty if there is none: enough have been written, the disk is full, or weights
        lie in parts.
    """
    folder = training.folder / "capsules" / f"step-{step:08d}"
    if training.recipe.train.shard or training.course.skipped or len(list(folder.parent.glob("step-*"))) >= MOST:
        return ""
    if not training.accelerator.is_main_process:
        return str(folder)
    try:
        folder.parent.mkdir(exist_ok=True)
        with whole_folder(folder) as aside:
            written = write_tensors(aside / "model.safetensors", _on_host(training.method.state_dict()))
            facts = _facts(training, step, complaint, loss, grad_norm)
            write_json(aside / "capsule.json", {**facts, "sha256": written["sha256"]})
    except OSError:
        return ""
    return str(folder)


def _facts(training: Training, step: int, complaint: str, loss: float, grad_norm: float) -> dict[str, Any]:
    accelerator = training.accelerator
    batches = batches_of(training.recipe, training.course.rewinds, step, training.images, training.plan)
    return {
        "format": FORMAT,
        "step": step,
        "complaint": complaint,
        "loss": repr(loss),  # JSON has no word for what is not a number
        "grad_norm": repr(grad_norm),
        "detour": training.course.rewinds,
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "torch": torch.__version__,
        "sample_ids": [sample for _, sample in next(iter(batches))],
        "images": training.images,
        "recipe": training.recipe.as_tables(),
    }


def batches_of(recipe: Recipe, detour: int, step: int, images: int, plan: OrderPlan | None) -> GlobalBatchSampler:
    """The whole global batch of one step."""
    return GlobalBatchSampler(
        images,
        recipe.train.batch_size,
        recipe.train.seed,
        start_step=step,
        total_steps=step + 1,
        order_variant=detour,
        plan=plan,
    )


def read_capsule(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and weights of a capsule.

    Raises:
        UserError: It is none, or torn.
    """
    try:
        for name in ("capsule.json", "model.safetensors"):
            if not stat.S_ISREG((folder / name).lstat().st_mode):
                raise ValueError(f"{name} is no plain file")
        facts = json.loads((folder / "capsule.json").read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise UserError(f"{folder}: a capsule of format {facts['format']!r}; this version reads {FORMAT}")
        if facts["sha256"] != sha256_of(folder / "model.safetensors"):
            raise UserError(f"{folder / 'model.safetensors'}: torn or altered since it was written")
        step, images, detour = (int(facts[name]) for name in ("step", "images", "detour"))
        then = [float(facts[name]) for name in ("loss", "grad_norm")]
        if not all(0 <= each < MAX_COUNT for each in (step, images, detour)) or len(then) != 2:
            raise ValueError("numbers that cannot be")
        known = {"recipe": dict, "device": str, "torch": str, "processes": int, "step": int, "images": int}
        for name, kind in {**known, "detour": int, "complaint": str}.items():
            if not isinstance(facts[name], kind):
                raise ValueError(f"{name} cannot be {facts[name]!r:.50}")
        return facts, load_file(folder / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: not a capsule ({type(error).__name__}: {str(error)[:200]})") from error


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
