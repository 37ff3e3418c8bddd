"""From JPEG files to trained steps: the loader alone, and end to end, with views of the CPU and of the device."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from gpu_sections.common import Plan, Row, paper_recipe, random_batch, training, wait
from sslkit.engine.setup import make_train_loader
from sslkit.engine.steps_in_flight import steps_to_measure

HEIGHT, WIDTH = 375, 500


def run(plan: Plan) -> list[Row]:
    """One row a device of the views."""
    with tempfile.TemporaryDirectory() as name:
        make_images(Path(name), 64 if plan.toy else 2000)
        rows = []
        for views in ("cpu", "accelerator"):
            stated = [f"views.device={views}"]
            stated += [f"data.workers={1 if plan.toy else cores()}"]
            for recipe in ("mocov2_r50",) if plan.toy else ("mocov2_r50", "mocov3_vitb"):
                rows.append({"recipe": recipe, "views": views, **measure(plan, recipe, Path(name), stated)})
    return rows


def cores() -> int:
    """Number of cores of this process."""
    return len(os.sched_getaffinity(0))


def make_images(folder: Path, count: int) -> None:
    """Write JPEGs of smooth random pictures, of about the size in bytes of photos."""
    random = np.random.default_rng(0)
    for index in range(count):
        coarse = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        picture = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        noise = random.normal(0, 12, picture.shape)
        pixels = np.clip(picture + noise, 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{index:05d}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])


def measure(plan: Plan, name: str, folder: Path, stated: list[str]) -> Row:
    """Images a second of the loader, of steps on resident data, and of both together."""
    recipe = paper_recipe(plan, name, 256, *stated, "train.epochs=40", folder=folder)
    with training(recipe) as (state, _):
        batch_size = recipe.train.batch_size
        alone = rate(plan, state, None, batch_size)
        steps = steps_to_measure(state)
        resident = random_batch(state)
        for _ in range(5):
            steps.start(resident)
            steps.finish(all_steps=False)
        wait(plan.device)
        started = time.perf_counter()
        count = 2 if plan.toy else 15
        for _ in range(count):
            steps.start(resident)
            steps.finish(all_steps=False)
        wait(plan.device)
        on_device = count * batch_size / (time.perf_counter() - started)
        both = rate(plan, state, steps, batch_size)
    return {"loader": alone, "resident": on_device, "end to end": both, "share of resident": both / on_device}


def rate(plan: Plan, state: Any, steps: Any, batch_size: int) -> float:
    """Images a second from files, after the first batches; with ``steps``, trained on."""
    first, count = (1, 3) if plan.toy else (6, 30)
    started = time.perf_counter()
    step = state.step
    for index, batch in enumerate(make_train_loader(state, step + count)):
        if index == first:
            wait(plan.device)
            started = time.perf_counter()
        if steps is not None:
            steps.start(batch)
            steps.finish(all_steps=False)
    wait(plan.device)
    torch.cuda.empty_cache()
    return (count - first) * batch_size / (time.perf_counter() - started)
