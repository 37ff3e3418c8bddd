"""The recipe's method on a few of the user's images, and what can be seen of one step."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sslkit.data.augment.cpu import ViewPipeline, normalise
from sslkit.data.augment.gpu import finish_on
from sslkit.data.loading.loader import make_loader
from sslkit.data.order.sampler import GlobalBatchSampler
from sslkit.data.sources.image_source import ImageSource
from sslkit.doctor.findings import Say
from sslkit.engine.batch_checks import check_batch_split
from sslkit.engine.setup import build_method
from sslkit.methods import BatchInfo, Method, Progress, Step
from sslkit.methods.base import Features, Permutation, Prepare, Views
from sslkit.parts.memory_bank import MemoryBank
from sslkit.parts.momentum_teacher import MomentumTeacher
from sslkit.parts.queue import KeyQueue
from sslkit.recipe.resolve import Recipe

FEW_IMAGES, FEWER_IMAGES = 16, 4
HEAVY = 60_000_000  # parameters from which a forward pass on the CPU is worth saving
MOST_GROUPS = 4
START = Progress(0, 100_000)  # a long run at its start


@dataclass
class Observation:
    """One pass through a method.

    Attributes:
        loss: () tensor.
        student: Features given to the objective, their gradients kept.
        teacher: The teacher's.
        asked: Names of the teacher modules that were called.
        embeddings: What the teacher's last head returned, call by call.
        written: Names of the queues and banks that the pass wrote to.
        saved_bytes: What autograd kept for the backward pass, weights not counted.
        seconds: Of forward and backward.
    """

    loss: Tensor
    student: Features = field(default_factory=list)
    teacher: Features = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    embeddings: Features = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    saved_bytes: int = 0
    seconds: float = 0.0


@dataclass
class Patient:
    """A method in training mode on the CPU in float32, and a small batch.

    Attributes:
        recipe: What it was built from.
        method: Built as a run builds it; at most `MOST_GROUPS` BN groups, so that a small batch fills them.
        views: uint8, each (B, H, W, 3).
        sample_ids: (B,) int64.
        loading_seconds: To read the batch and cut its views, in this process.
    """

    recipe: Recipe
    method: Method
    views: Views
    sample_ids: Tensor
    loading_seconds: float

    @property
    def batch(self) -> int:
        """Number of images B."""
        return len(self.sample_ids)

    @property
    def info(self) -> BatchInfo:
        """The samples of the batch."""
        return BatchInfo(self.sample_ids)

    @property
    def prepare(self) -> Prepare:
        """The engine's normalisation of a view."""
        return partial(normalise, mean=self.recipe.views.mean, std=self.recipe.views.std)

    @property
    def permutation(self) -> Permutation | None:
        """An order of keys that spreads every BN group over all others, if the method shuffles."""
        return spread_order(self.batch, self.method.bn_groups) if self.method.shuffle_keys else None

    def observe(self, views: Views | None = None, *, backward: bool = False) -> Observation:
        """Run the method's own ``forward``, with the same random draws each time."""
        method, started = self.method, time.perf_counter()
        with torch.random.fork_rng(devices=[]), watching(method) as seen, torch.set_grad_enabled(backward):
            torch.manual_seed(self.recipe.train.seed)
            before = {name: dictionary_rows(part, self.sample_ids) for name, part in method.dictionaries().items()}
            step = method(self.views if views is None else views, self.info, START, self.permutation, self.prepare)
            seen.loss = step.loss
            if backward and step.loss.requires_grad:
                step.loss.backward()
        after = {name: dictionary_rows(part, self.sample_ids) for name, part in method.dictionaries().items()}
        seen.written = [name for name in before if not torch.equal(before[name], after[name])]
        float(seen.loss.detach())  # a GPU may still be at it
        seen.seconds = time.perf_counter() - started
        return seen


def admit(recipe: Recipe, source: ImageSource, say: Say) -> Patient:
    """Build the method and cut the first images of the run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        method = build_method(recipe, len(source)).train()
    check_batch_split(recipe, method, processes_of(recipe))
    method.bn_groups = min(method.bn_groups, MOST_GROUPS)
    size = sum(param.numel() for param in method.parameters())
    batch = small_batch(recipe, method.bn_groups, heavy=size > HEAVY)
    say(f"one step of {recipe.method_name} on {recipe.backbone.name}, {batch} images, on the CPU"
        + (" (a large net: this takes a while)" if size > HEAVY else ""))  # fmt: skip
    started = time.perf_counter()
    batches = GlobalBatchSampler(len(source), batch, recipe.train.seed, total_steps=1, plan=source.plan)
    pipeline = ViewPipeline(recipe.views, recipe.train.seed)
    loaded = next(iter(make_loader(source, pipeline, batches, workers=0, pin_memory=False)))
    images = finish_on(torch.device("cpu"), loaded, recipe.views)
    return Patient(recipe, method, images.views, images.sample_ids, time.perf_counter() - started)


def processes_of(recipe: Recipe) -> int:
    """How many processes the run is meant for; one, where neither recipe nor launcher says more."""
    return recipe.train.processes or int(os.environ.get("WORLD_SIZE", "1"))


def small_batch(recipe: Recipe, groups: int, *, heavy: bool) -> int:
    """As few images as still fill every BN group; a group of fewer than two has no statistics."""
    wanted = max(FEWER_IMAGES if heavy else FEW_IMAGES, 2 * groups)
    return min(wanted, recipe.train.batch_size) // groups * groups


def spread_order(batch: int, groups: int) -> Permutation:
    """The permutation that deals each of the contiguous groups out over all of them."""
    if batch % groups:
        return np.arange(batch)
    return np.arange(batch).reshape(groups, -1).T.reshape(-1)


def teachers(method: Method) -> dict[str, nn.Module]:
    """The teacher's modules, by name."""
    return {f"teacher_{name}": teacher for name, teacher in method.teachers().items()}


def children(method: Method) -> dict[str, nn.Module]:
    """Direct children by name; a module under two names is there twice."""
    named = method.named_modules(remove_duplicate=False)
    return {name: child for name, child in named if name and "." not in name}


def counterpart(method: Method, name: str) -> nn.Module | None:
    """The student's module that a teacher's follows: ``projector`` for ``teacher_projector``."""
    student = method.get_submodule(name.removeprefix("teacher_"))
    own = [param.shape for param in teachers(method)[name].parameters()]
    return student if [param.shape for param in student.parameters()] == own else None


def is_the_student(method: Method, name: str) -> bool:
    """Whether a teacher module holds the student's own weights instead of copies."""
    student = counterpart(method, name)
    own = {id(param) for param in teachers(method)[name].parameters()}
    return student is not None and any(id(param) in own for param in student.parameters())


def dictionary_rows(part: KeyQueue | MemoryBank, sample_ids: Tensor) -> Tensor:
    """A copy of a queue's keys, or of the batch's own rows of a bank."""
    return part.keys.clone() if isinstance(part, KeyQueue) else part.rows[sample_ids].clone()


def key_queue(method: Method) -> KeyQueue | None:
    """The queue whose keys are negatives; SwAV's queues serve its codes."""
    if method.negatives != "queue":
        return None
    return next(part for part in method.dictionaries().values() if isinstance(part, KeyQueue))


@contextmanager
def watching(method: Method) -> Iterator[Observation]:
    """See what passes between student, teacher and objective, who is asked, and what autograd saves."""
    seen = Observation(torch.empty(()))
    own = {param.untyped_storage().data_ptr() for param in method.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = _listen_to_teachers(method, seen)
    method.__dict__["objective"] = _recording(method.objective, seen)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield seen
    finally:
        del method.__dict__["objective"]
        for hook in hooks:
            hook.remove()
        seen.saved_bytes = sum(saved.values())


def _recording(
    objective: Callable[[Features, Features, BatchInfo, Progress], Step], seen: Observation
) -> Callable[..., Step]:
    """The objective, which also writes down what it is given."""

    def record(student_features: Features, teacher_features: Features, batch: BatchInfo, progress: Progress) -> Step:
        for features in student_features:
            if features.requires_grad:
                features.retain_grad()
        seen.student, seen.teacher = list(student_features), list(teacher_features)
        return objective(student_features, teacher_features, batch, progress)

    return record


def _listen_to_teachers(method: Method, seen: Observation) -> list[RemovableHandle]:
    """Write down which teacher modules are called, and what the heads return."""

    def call(name: str, output: Any) -> None:
        seen.asked.add(name)
        if "backbone" not in name and isinstance(output, Tensor):
            seen.embeddings.append(output.detach())

    hooks = []
    for name, child in teachers(method).items():
        hooks.append(child.register_forward_hook(lambda _module, _inputs, output, name=name: call(name, output)))
        if isinstance(child, MomentumTeacher):  # its own forward may be bypassed
            inner = child.module
            hooks.append(inner.register_forward_hook(lambda _module, _inputs, _output, name=name: seen.asked.add(name)))
    return hooks
