"""Where the host waits for the GPU in a step of the loop, and how many kernels a step launches."""

import traceback
import warnings
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_sections.common import Plan, Row, paper_recipe, random_batch, training, wait
from sslkit.engine.steps_in_flight import steps_to_measure

RECIPES = {"mocov2_r50": 256, "simclr_r50": 256, "mocov3_vitb": 256, "swav_r50": 64, "instdisc_r50": 256}
STEPS = 4


def run(plan: Plan) -> list[Row]:
    """One row a recipe, and one a line that waits."""
    rows = []
    for name, batch in RECIPES.items():
        if plan.toy and name not in ("mocov2_r50", "mocov3_vitb"):
            continue
        with training(paper_recipe(plan, name, batch)) as (state, _):
            rows += measure(plan, name, state)
    return rows


def measure(plan: Plan, name: str, state: Any) -> list[Row]:
    """Run steps with PyTorch's warnings about waits on; then under the profiler."""
    steps, batch = steps_to_measure(state), random_batch(state)
    for _ in range(STEPS):
        steps.start(batch)
        steps.finish(all_steps=False)
    found: Counter[str] = Counter()

    def note(message: object, *_: object) -> None:
        if "synchroniz" in str(message):
            frame = next((each for each in reversed(traceback.extract_stack()) if "sslkit/" in each.filename), None)
            found[f"{frame.filename.split('/sslkit/')[-1]}:{frame.lineno}" if frame else "elsewhere"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        set_mode(plan, "warn")
        for _ in range(STEPS):
            steps.start(batch)
            set_mode(plan, "default")  # a step's numbers have arrived by now
            steps.finish(all_steps=False)
            set_mode(plan, "warn")
        set_mode(plan, "default")
    kernels, busy = profiled(plan, steps, batch)
    row = {"recipe": name, "waits a step": sum(found.values()) / STEPS, "right": not found}
    row |= {"kernels a step": kernels, "device busy": busy}
    return [row, *({"recipe": f"{name}: {where}", "waits a step": count / STEPS} for where, count in found.items())]


def set_mode(plan: Plan, mode: str) -> None:
    """Set PyTorch's mode of warnings about waits."""
    if plan.device.type == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


def profiled(plan: Plan, steps: Any, batch: Any) -> tuple[float | None, float | None]:
    """Kernels a step, and the share of the time in which the device ran one; None on a CPU."""
    if plan.device.type != "cuda":
        return None, None
    wait(plan.device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            steps.start(batch)
            steps.finish(all_steps=False)
        wait(plan.device)
    spans = sorted((each.time_range.start, each.time_range.end) for each in profiler.events() if each.device_index >= 0)
    busy, end = 0.0, 0.0
    for start, stop in spans:
        busy += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return len(spans) / STEPS, busy / (end - spans[0][0]) if spans else None
