"""Whether the device computes what a CPU does, and whether a run survives what it should."""

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file
from torch import Tensor

import sslkit
from gpu_sections.common import Plan, Row, apart, differing, largest_difference, random_batch, small_recipe, training
from sslkit.data.augment.gpu import finish_on
from sslkit.engine import setup
from sslkit.engine.step import forward_and_backward, train_step
from sslkit.methods import BatchInfo, Progress
from sslkit.methods.base import Step


def run(plan: Plan) -> list[Row]:
    """One row a check."""
    rows: list[Row] = []
    for name in plan.methods:
        rows += [same_as_cpu(plan, name), low_precision(plan, name), sliced(name)]
    checks: list[Callable[[], Row]] = [device_views, resumed, skipped, rewound]
    return [*rows, *(check() for check in checks)]


def gradients(recipe: Any) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, gradient norm and gradients of a first step on a batch of random pixels."""
    with training(recipe) as (state, guard):
        batch = random_batch(state)
        result = train_step(state, batch, guard)
        grads = {name: p.grad.clone() for name, p in state.method.named_parameters() if p.grad is not None}
        return result.loss, result.grad_norm, grads


def same_as_cpu(plan: Plan, name: str) -> Row:
    """Loss and gradients in float32, TF32 off, against the CPU's from the same weights and pixels."""
    with training(small_recipe(name)) as (state, _):
        batch, weights = random_batch(state), copy.deepcopy(state.method.state_dict())
        loss = forward_and_backward(state, batch).loss
        found = {key: p.grad.clone() for key, p in state.method.named_parameters() if p.grad is not None}
    with mock.patch.dict("os.environ", {"ACCELERATE_USE_CPU": "true"}), training(small_recipe(name)) as (state, _):
        state.method.load_state_dict({key: value.cpu() for key, value in weights.items()})
        expected = forward_and_backward(state, send_to_device_of(batch, "cpu")).loss
        grads = {key: p.grad.clone() for key, p in state.method.named_parameters() if p.grad is not None}
    off_loss = largest_difference(expected, loss)
    off_grads = apart(grads, found)
    return {
        "check": f"{name}: float32 as on the CPU",
        "right": off_loss < 1e-4 and off_grads < 1e-3,
        "found": f"loss {off_loss:.1e}, gradients {off_grads:.1e}",
    }


def send_to_device_of(batch: Any, device: str) -> Any:
    """The batch on another device."""
    moved = send_to_device([*batch.views, batch.sample_ids], device)
    return type(batch)(moved[:-1], moved[-1])


def low_precision(plan: Plan, name: str) -> Row:
    """Loss and norm of the gradients in bf16 and, on GPUs, fp16, whose norm must not be that of the scaled loss."""
    precisions = ("bf16", "fp16") if plan.device.type == "cuda" else ("bf16",)
    loss, norm, _ = gradients(small_recipe(name))
    off = {}
    for precision in precisions:
        low = gradients(small_recipe(name, train={"precision": precision}))
        off[precision] = (abs(low[0] / loss - 1), abs(low[1] / norm - 1))
    return {
        "check": f"{name}: {' and '.join(precisions)} near float32",
        "right": all(of_loss < 0.05 and of_norm < 0.5 for of_loss, of_norm in off.values()),
        "found": ", ".join(f"{key}: loss {a:.1e}, norm {b:.1e}" for key, (a, b) in off.items()),
    }


def sliced(name: str) -> Row:
    """Gradients of a batch in slices against those of the whole one, on a backbone without BatchNorm."""
    options = {"backbone": {"name": "test_vit"}, "views": {"policy": "small_gray", "size": 32}}
    whole = gradients(small_recipe(name, **options))
    parts = gradients(small_recipe(name, **options, train={"micro_batch": 8}))
    off = apart(whole[2], parts[2])
    return {"check": f"{name}: slices equal the whole batch", "right": off < 1e-3, "found": f"gradients {off:.1e}"}


def device_views() -> Row:
    """Pixels of views that the device finishes against the CPU's."""
    made: dict[str, list[Tensor]] = {}
    for device in ("cpu", "accelerator"):
        recipe = small_recipe("moco_v2", views={"policy": "moco_v2", "size": 64, "device": device})
        with training(recipe) as (state, _):
            batch = next(iter(setup.make_train_loader(state, 1)))
            made[device] = [view.cpu() for view in finished(state, batch)]
    off = max(float((a.int() - b.int()).abs().float().mean()) for a, b in zip(*made.values(), strict=True))
    return {"check": "device views as on the CPU", "right": off < 1.0, "found": f"{off:.2f} of 255 apart on average"}


def finished(state: Any, batch: Any) -> list[Tensor]:
    """The views of a batch, finished on the device."""
    views: list[Tensor] = finish_on(state.accelerator.device, batch, state.recipe.views).views
    return views


def trained(folder: Path, **tables: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint of a run."""
    sslkit.train(small_recipe("moco_v2", **tables), folder)
    newest = max((folder / "checkpoints").glob("step-*"))
    return load_file(newest / "model.safetensors") | load_file(newest / "optimizer.safetensors")


@contextmanager
def deterministic() -> Iterator[None]:
    """Let cuDNN take algorithms that give the same bits each time."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def resumed() -> Row:
    """A run that was stopped and resumed against an undisturbed one, bit for bit."""
    with tempfile.TemporaryDirectory() as name, deterministic():
        whole = trained(Path(name) / "whole")
        trained(Path(name) / "parts", train={"max_steps": 3})
        parts = trained(Path(name) / "parts")
    names = differing(whole, parts)
    return {
        "check": "resumed run equals an undisturbed one",
        "right": not names,
        "found": f"{len(names)} tensors differ",
    }


def poisoned(bad: set[int]) -> Any:
    """Make the loss of some steps not a number, each once."""
    build, left = setup.build_method, set(bad)

    def broken(*arguments: Any) -> Any:
        method = build(*arguments)
        objective = method.objective

        def with_poison(student: Any, teacher: Any, batch: BatchInfo, progress: Progress) -> Step:
            step: Step = objective(student, teacher, batch, progress)
            if progress.updates in left:
                left.remove(progress.updates)
                step.loss = step.loss * math.nan
            return step

        method.objective = with_poison
        return method

    return mock.patch.object(setup, "build_method", broken)


def skipped() -> Row:
    """A skipped last step leaves every tensor as it was."""
    with tempfile.TemporaryDirectory() as name, deterministic():
        short = trained(Path(name) / "short", train={"max_steps": 5}, guard={"policy": "skip"})
        with poisoned({5}):
            whole = trained(Path(name) / "whole", guard={"policy": "skip"})
    names = differing(short, whole)
    return {"check": "skipped steps leave no trace", "right": not names, "found": f"{len(names)} tensors differ"}


def rewound() -> Row:
    """Too many bad steps in a row take the run back to a checkpoint, and it ends."""
    guard = {"policy": "skip", "max_skips": 0, "max_rewinds": 1}
    with tempfile.TemporaryDirectory() as name, poisoned({4}):
        recipe = small_recipe("moco_v2", guard=guard, checkpoint={"every_steps": 2, "keep": 9})
        finished_run = sslkit.train(recipe, Path(name) / "run")
        state = (Path(name) / "run/checkpoints/step-00000006/state.json").read_text()
    right = finished_run.step == 6 and '"rewinds": 1' in state.replace('"rewinds":1', '"rewinds": 1')
    return {
        "check": "bad steps in a row: back to a checkpoint",
        "right": right,
        "found": f"ended at {finished_run.step}",
    }
