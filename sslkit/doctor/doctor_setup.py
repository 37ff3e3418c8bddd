"""The recipe's method and a small batch of its data, for checks that need a training step."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sslkit.data.augment.cpu import ViewPipeline, normalise
from sslkit.data.augment.gpu import finish_on
from sslkit.data.batch import Batch
from sslkit.data.loading.loader import make_loader
from sslkit.data.order.sampler import GlobalBatchSampler
from sslkit.data.sources.image_source import ImageSource
from sslkit.doctor.findings import LogMessage
from sslkit.engine.cost.step_cost import saved_bytes
from sslkit.methods import BatchInfo, Method, Progress
from sslkit.methods.base import Features, Permutation, Views
from sslkit.parts.batch_slices import local_bn_groups
from sslkit.recipe.resolve import Recipe

START = Progress(0, 100_000)  # of a long run, so that momentum has its initial value
BATCH, LARGE_MODEL_BATCH = 16, 4
LARGE_MODEL = 60_000_000  # parameters above which a step on the CPU is slow
MAX_BN_GROUPS = 4


@dataclass(frozen=True)
class StepRecord:
    """One forward pass of a method, with or without its backward pass."""

    loss: Tensor  # ()
    student_features: Features  # after a backward pass their ``grad`` is set
    teacher_features: Features
    activation_bytes: int  # saved by autograd for the backward pass, without the parameters
    seconds: float


@dataclass
class DoctorSetup:
    """A method in training mode and a small batch, on the CPU in float32."""

    recipe: Recipe
    method: Method  # with at most `MAX_BN_GROUPS` BN groups, so that a small batch fills them
    views: Views  # uint8, each (B, H, W, 3)
    sample_ids: Tensor  # (B,) int64
    loading_seconds: float  # time to read the batch and make its views in this process

    @property
    def batch_size(self) -> int:
        """Number of images B."""
        return len(self.sample_ids)

    def run_step(self, views: Views | None = None, *, backward: bool = False) -> StepRecord:
        """Make the forward pass of `Method.forward`, with the same random draws each time."""
        method, started = self.method, time.perf_counter()
        order = spread_order(self.batch_size, method.bn_groups) if method.shuffle_keys else None
        prepare = partial(normalise, mean=self.recipe.views.mean, std=self.recipe.views.std)
        inputs = (self.views if views is None else views, local_bn_groups(method.bn_groups), order, prepare)
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(backward), saved_bytes(method) as saved:
            torch.manual_seed(self.recipe.train.seed)
            student, teacher = method.student_in_slices(*inputs), method.teacher_in_slices(*inputs)
            for features in student:
                if features.requires_grad:
                    features.retain_grad()
            loss = method.objective(student, teacher, BatchInfo(self.sample_ids), START).loss
            if loss.requires_grad:
                loss.backward()
        float(loss.detach())  # waits for a GPU
        return StepRecord(loss, student, teacher, sum(saved.values()), time.perf_counter() - started)


def set_up_checks(recipe: Recipe, source: ImageSource, method: Method, log_message: LogMessage) -> DoctorSetup:
    """Load the first images of the run for a method that `build_method` has built: at least two in each BN group."""
    method.train()
    method.bn_groups = groups = min(method.bn_groups, MAX_BN_GROUPS)
    is_large = sum(param.numel() for param in method.parameters()) > LARGE_MODEL
    wanted = max(LARGE_MODEL_BATCH if is_large else BATCH, 2 * groups)
    batch_size = min(wanted, recipe.train.batch_size) // groups * groups
    log_message(
        f"running one step of {recipe.method_name} on {recipe.backbone.name} with {batch_size} images, on the CPU"
        + (" (a large model: this takes a while)" if is_large else "")
    )
    started = time.perf_counter()
    batch = finish_on(torch.device("cpu"), next(load_batches(recipe, source, batch_size, steps=1)), recipe.views)
    return DoctorSetup(recipe, method, batch.views, batch.sample_ids, time.perf_counter() - started)


def load_batches(recipe: Recipe, source: ImageSource, batch_size: int, steps: int) -> Iterator[Batch]:
    """The first batches of the run at this batch size, loaded in this process."""
    batches = GlobalBatchSampler(len(source), batch_size, recipe.train.seed, total_steps=steps, plan=source.plan)
    pipeline = ViewPipeline(recipe.views, recipe.train.seed)
    return iter(make_loader(source, pipeline, batches, workers=0, pin_memory=False))


def launched_processes() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_processes(recipe: Recipe) -> int:
    """Number of processes of the run, from the recipe or the launcher; 1 if neither says."""
    return recipe.train.processes or launched_processes()


def spread_order(batch_size: int, bn_groups: int) -> Permutation:
    """The permutation that distributes each contiguous BN group over all of them."""
    return np.arange(batch_size).reshape(bn_groups, -1).T.reshape(-1)
