"""A recipe's steps, made as a run makes them but for what it writes, and timed twice: untouched, and stage by stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sslkit.data.augment.cpu import ViewPipeline, normalise
from sslkit.data.augment.gpu import finish_on
from sslkit.data.batch import Batch
from sslkit.data.loading.loader import cores_of_a_process
from sslkit.data.sources.image_source import open_source
from sslkit.distributed.collectives import max_over_processes
from sslkit.engine.accelerator import make_accelerator, processes_here, workers_of
from sslkit.engine.batch_checks import steps_per_epoch
from sslkit.engine.logging.throughput import ThroughputMeter
from sslkit.engine.resilience.guard import Guard
from sslkit.engine.setup import make_train_loader, set_up_training
from sslkit.engine.state import TrainingState
from sslkit.engine.step import train_step
from sslkit.profiling.image_cost import ImageCosts, image_costs
from sslkit.profiling.stage_timer import BACKWARD, COLLECTIVES, REST, STAGES, Stopwatch, wait_for, watched
from sslkit.recipe.resolve import Recipe

CPU = torch.device("cpu")
WARM_UP = 3  # steps: kernels are chosen, memory is found
LEAST = 3  # steps of each measurement, however long they take
ENDLESS = 2**40  # steps


@dataclass(frozen=True)
class Profile:
    """What was measured on this process. Times are seconds of one step, unless said otherwise.

    Attributes:
        device: Kind and name.
        process: This one's number.
        processes: Of the whole run.
        cores: Of this machine, for each process.
        workers: Data workers of each process.
        batch: Images of a step on this process.
        steps: How many were timed untouched.
        step: One step, untouched.
        waiting: The part of it spent waiting for data.
        stages: Each stage of a step, with the device waited for at its end; without the wait for data.
        images: What an image costs a data worker.
        bf16: The student's forward and backward pass in bfloat16 over that in float32; None where that is no question.
        peak_bytes: Most memory of the device in use; None on CPUs.
    """

    device: str
    process: int
    processes: int
    cores: int
    workers: int
    batch: int
    steps: int
    step: float
    waiting: float
    stages: dict[str, float]
    images: ImageCosts
    bf16: float | None
    peak_bytes: int | None

    @property
    def images_per_second(self) -> float:
        """Over all processes."""
        return self.batch * self.processes / self.step

    @property
    def computing(self) -> float:
        """A step without the wait for data."""
        return self.step - self.waiting


def profile(recipe: Recipe, seconds: float = 20.0) -> Profile:
    """Measure for about so many seconds, after some to start; nothing is written to disk.

    Raises:
        UserError: Something in recipe or data is not as it must be.
    """
    source = open_source(recipe.data).without_labels()
    steps_per_epoch(recipe, source)
    with one_thread():
        images = image_costs(source, ViewPipeline(recipe.views, recipe.train.seed), seconds / 5)
    accelerator = make_accelerator(recipe)
    try:
        return measure(set_up_training(recipe, source, accelerator), images, seconds)
    finally:
        accelerator.end_training()
        if accelerator.num_processes == 1:
            accelerator.state._reset_state(reset_partial_state=True)


def measure(training: TrainingState, images: ImageCosts, seconds: float) -> Profile:
    """`profile` of what is ready to go."""
    accelerator, device = training.accelerator, training.accelerator.device
    batch, processes = training.recipe.train.batch_size, accelerator.num_processes
    training.method.train()
    guard = Guard(training.recipe.guard, training.recovery, training.method)
    clock = ThroughputMeter(batch)
    batches = iter(clock.timed(make_train_loader(training, ENDLESS)))

    def steps(count: int, watch: Stopwatch) -> float:
        started = time.perf_counter()
        for _ in range(count):
            step(training, next(batches), guard, watch)
        wait_for(device)
        return (time.perf_counter() - started) / count

    steps(WARM_UP, Stopwatch(CPU))
    first = steps(1, Stopwatch(CPU))

    def fitting(share: float) -> int:
        return int(max_over_processes(torch.tensor(max(share * seconds / first, LEAST), device=device)))

    count, few = fitting(0.5), fitting(0.2)
    clock.restart()
    untouched = steps(count, Stopwatch(CPU))  # waits for no device: as a run goes
    waiting = clock.waited / count
    with watched(training, Stopwatch(device)) as watch:
        steps(few, watch)
    stages = {name: watch.seconds[name] / few for name in STAGES}
    if processes > 1 and not training.recipe.train.micro_batch:
        with watched(training, Stopwatch(device)) as alone, accelerator.no_sync(training.wrapped):
            steps(few, alone)
        reduction = max(stages[BACKWARD] - alone.seconds[BACKWARD] / few, 0.0)
        stages[BACKWARD] -= reduction
        stages[COLLECTIVES] += reduction
    on_gpu = device.type == "cuda"
    return Profile(
        device=torch.cuda.get_device_name(device) if on_gpu else device.type,
        process=accelerator.process_index,
        processes=processes,
        cores=cores_of_a_process(processes_here()),
        workers=workers_of(training.recipe, accelerator),
        batch=batch // processes,
        steps=count,
        step=untouched,
        waiting=waiting,
        stages=stages,
        images=images,
        bf16=_bf16(training, next(batches)) if on_gpu else None,
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
    )


def step(training: TrainingState, batch: Batch, guard: Guard, watch: Stopwatch) -> None:
    """Make a training step; after the last step of the schedule the first follows."""
    training.step %= training.recipe.train.epochs * training.steps_per_epoch
    with watch.stage(REST):
        train_step(training, batch, guard, poll=lambda: (False,))


def compare_precisions(backbone: nn.Module, views: Tensor, seconds: float = 2.0) -> float:
    """Time of a forward and backward pass in bfloat16 over that in float32, taken in turn for about so long."""
    spent = {True: 0.0, False: 0.0}
    warm = False
    while sum(spent.values()) < seconds:
        for low in (True, False):
            wait_for(views.device)
            started = time.perf_counter()
            with torch.autocast(views.device.type, torch.bfloat16, enabled=low):
                features = backbone(views)
            features.float().sum().backward()
            wait_for(views.device)
            spent[low] += (time.perf_counter() - started) * warm
        warm = True
    backbone.zero_grad()
    return spent[True] / spent[False]


def _bf16(training: TrainingState, batch: Batch) -> float | None:
    """`compare_precisions` of the student on the first view, unless the recipe has another precision already."""
    recipe, device = training.recipe, training.accelerator.device
    if recipe.train.precision != "no":
        return None
    most = recipe.train.micro_batch or len(batch.sample_ids)
    pixels = finish_on(device, batch, recipe.views).views[0][:most]
    return compare_precisions(training.method.backbone, normalise(pixels, recipe.views.mean, recipe.views.std))


@contextmanager
def one_thread() -> Iterator[None]:
    """As a data worker has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
