"""Images a second of the loop's steps on data that is already on the GPU, beside the bare passes."""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_sections.common import Plan, Row, paper_recipe, random_batch, training, wait
from sslkit.engine.cost.gpu_peaks import peak_flops
from sslkit.engine.cost.step_cost import count_step
from sslkit.engine.runtime.precision import chosen_precision
from sslkit.engine.steps_in_flight import steps_to_measure

CASES: tuple[tuple[str, int, list[str]], ...] = (
    ("mocov2_r50", 256, ["train.precision=bf16"]),
    ("mocov2_r50", 256, ["train.precision=bf16", "method.bn_groups=1"]),
    ("mocov2_r50", 256, ["train.precision=no", "train.tf32=true"]),
    ("mocov2_r50", 256, ["train.precision=no", "train.tf32=false"]),
    ("mocov3_vitb", 256, ["train.precision=bf16"]),
    ("mocov3_vitb", 256, ["train.precision=bf16", "train.compile=true"]),
    ("mocov3_vitb", 256, ["train.precision=no", "train.tf32=true"]),
    ("simclr_r50", 256, ["train.precision=bf16"]),
    ("mocov2_r50", 256, ["train.precision=bf16", "train.compile=true"]),
)
ROUNDS, STEPS = 3, 8


def run(plan: Plan) -> list[Row]:
    """One row a case, as far as time allows; the bare passes are timed in turn with the steps."""
    cases = (CASES[0], CASES[4]) if plan.toy else CASES
    rows = []
    for name, batch, stated in cases:
        if plan.seconds_left() > 20:
            with training(paper_recipe(plan, name, batch, *stated)) as (state, _):
                rows.append({"recipe": name, "with": ", ".join(stated), **measure(plan, state)})
    return rows


def measure(plan: Plan, state: Any) -> Row:
    """Images a second, the time over that of the bare passes, MFU and peak memory."""
    recipe, device = state.recipe, plan.device
    steps, batch = steps_to_measure(state), random_batch(state)

    def step() -> None:
        steps.start(batch)
        steps.finish(all_steps=False)

    bare = bare_passes(state, [state.normalise(view) for view in batch.views])
    count = 2 if plan.toy else STEPS
    for work in (step, bare):
        timed(device, work, 2 if plan.toy else 5)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    pairs = [(timed(device, step, count), timed(device, bare, count)) for _ in range(1 if plan.toy else ROUNDS)]
    seconds, passes = (min(times) for times in zip(*pairs, strict=True))
    row: Row = {"images a second": recipe.train.batch_size / seconds, "over the bare passes": seconds / passes}
    if device.type == "cuda":
        row["peak memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
        precision = chosen_precision(recipe)
        peak = peak_flops(torch.cuda.get_device_name(device), precision, tf32=recipe.train.tf32)
        if peak:
            flops = count_step(recipe, recipe.train.batch_size, low_precision=precision != "no").flops
            row["MFU"] = flops / seconds / peak
    return row


def bare_passes(state: Any, views: list[Tensor]) -> Callable[[], None]:
    """Forward and backward of the student's backbone and forward of the teacher's, without BN groups."""
    method, accelerator = copy.deepcopy(state.method), state.accelerator
    method.bn_groups = 1
    student_views = len(method.student([view[:2] for view in views]))

    def passes() -> None:
        with accelerator.autocast():
            total = sum(method.backbone(view).float().sum() for view in views[:student_views])
            with torch.no_grad():
                for name, teacher in method.teachers().items():
                    if name == "backbone":
                        for index in method.teacher_views:
                            teacher(views[index])
        total.backward()
        method.backbone.zero_grad()

    return passes


def timed(device: torch.device, work: Callable[[], None], count: int) -> float:
    """Seconds of one call, of several in a row."""
    wait(device)
    started = time.perf_counter()
    for _ in range(count):
        work()
    wait(device)
    return (time.perf_counter() - started) / count
