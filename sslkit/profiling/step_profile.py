"""Measures the training steps of a recipe twice: as in a run, and stage by stage."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sslkit.data.augment.cpu import ViewPipeline, normalise
from sslkit.data.augment.gpu import finish_on
from sslkit.data.batch import Batch
from sslkit.data.loading.loader import cores_of_a_process
from sslkit.data.sources.image_source import open_source
from sslkit.distributed.collectives import max_over_processes
from sslkit.distributed.failures import explain_nccl
from sslkit.engine.accelerator import make_accelerator, processes_here, workers_of
from sslkit.engine.cost.device_meter import make_device_meter
from sslkit.engine.logging.throughput import ThroughputMeter
from sslkit.engine.resilience.out_of_memory import explain_set_up, explain_step
from sslkit.engine.runtime.precision import resolve_precision, restored_backends
from sslkit.engine.setup import make_train_loader, set_up_training, steps_per_epoch
from sslkit.engine.state import TrainingState
from sslkit.engine.steps_in_flight import StepsInFlight, steps_to_measure
from sslkit.errors import is_out_of_memory
from sslkit.profiling.image_cost import ImageCosts, image_costs
from sslkit.profiling.stage_timer import BACKWARD, COLLECTIVES, REST, STAGES, StageTimer, synchronize, timed
from sslkit.recipe.resolve import Recipe

CPU = torch.device("cpu")
WARM_UP_STEPS = 3  # kernels are chosen and memory is allocated
MIN_STEPS = 3.0  # of each measurement; the processes compare floats
ENDLESS = 2**40  # steps


@dataclass(frozen=True)
class Profile:
    """The measurements of one process. Times are in seconds for one step."""

    device: str  # name
    process: int  # rank
    processes: int  # in all
    cores: int  # of this machine for each process
    workers: int  # data workers of each process
    batch: int  # images of a step on this process
    steps: int  # measured as in a run
    step: float  # time of a step as in a run
    waiting: float  # the part of ``step`` spent waiting for data
    stages: dict[str, float]  # each synchronised with the device at its end; without waiting for data
    images: ImageCosts  # time that a data worker needs for an image
    bf16: float | None  # time of the student's passes relative to float32; None if it was not measured
    peak_bytes: int | None  # memory of the device; None on CPUs
    mfu: float | None = None  # share of the device's peak FLOP/s; None on CPUs and unknown devices
    gpu_busy: float | None = None  # share of the time in which kernels or copies run; None on CPUs and without a trace

    @property
    def images_per_second(self) -> float:
        """Images per second of all processes."""
        return self.batch * self.processes / self.step

    @property
    def computing(self) -> float:
        """Time of a step without waiting for data."""
        return self.step - self.waiting


@restored_backends()
@explain_nccl()
def profile(
    recipe: Recipe,
    seconds: float = 20.0,
    *,
    leave: bool = True,
    on_start: Callable[[], None] = lambda: None,
    trace: Callable[[TrainingState], float | None] | None = None,
) -> Profile:
    """Set up a run and measure its steps for about ``seconds``; nothing is written to disk.

    With several processes, ``leave`` says whether they leave their process group after it; if not, a run may follow.
    ``on_start`` is called once everything is set up. ``trace`` is called after the measurement, and returns
    `Profile.gpu_busy`.
    """
    recipe = resolve_precision(recipe)
    source = open_source(recipe.data).without_labels()
    steps_per_epoch(recipe, source)
    accelerator = make_accelerator(recipe)
    try:
        with explain_set_up(accelerator.device):
            training = set_up_training(recipe, source, accelerator)
        on_start()
        with one_thread():
            images = image_costs(source, ViewPipeline(recipe.views, recipe.train.seed), seconds / 5)
        try:
            measured = measure(training, images, seconds)
            return measured if trace is None else replace(measured, gpu_busy=trace(training))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise explain_step(training, error) from error
            raise
    finally:
        if leave:
            accelerator.end_training()
        if accelerator.num_processes == 1:
            accelerator.state._reset_state(reset_partial_state=True)


def measure(training: TrainingState, images: ImageCosts, seconds: float) -> Profile:
    """Measure the steps of a training state."""
    accelerator, device = training.accelerator, training.accelerator.device
    batch, processes = training.recipe.train.batch_size, accelerator.num_processes
    training.method.train()
    in_flight = steps_to_measure(training)
    meter = ThroughputMeter(batch)
    batches = iter(meter.timed(make_train_loader(training, ENDLESS)))

    def steps(count: int, timer: StageTimer) -> float:
        started = time.perf_counter()
        for _ in range(count):
            step(training, next(batches), in_flight, timer)
        synchronize(device)
        return (time.perf_counter() - started) / count

    steps(WARM_UP_STEPS, StageTimer(CPU))
    first = steps(1, StageTimer(CPU))

    def count_for(share: float) -> int:
        return int(max_over_processes(torch.tensor(max(share * seconds / first, MIN_STEPS), device=device)))

    count, few = count_for(0.5), count_for(0.2)
    meter.restart()
    step_seconds = steps(count, StageTimer(CPU))  # without synchronising, as in a run
    waiting = meter.waited / count
    with timed(training, StageTimer(device)) as timer:
        steps(few, timer)
    stages = {name: timer.seconds[name] / few for name in STAGES}
    if processes > 1 and not training.recipe.train.micro_batch:
        with timed(training, StageTimer(device)) as alone, accelerator.no_sync(training.wrapped):
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
        step=step_seconds,
        waiting=waiting,
        stages=stages,
        images=images,
        bf16=_bf16(training, next(batches)) if on_gpu else None,
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        mfu=make_device_meter(training).mfu(1 / step_seconds),
    )


def step(training: TrainingState, batch: Batch, steps: StepsInFlight, timer: StageTimer) -> None:
    """Make a training step; the schedule starts again after its last step."""
    training.step %= training.recipe.train.epochs * training.steps_per_epoch
    with timer.stage(REST):
        steps.start(batch)
        steps.finish(all_steps=False)


def compare_precisions(backbone: nn.Module, views: Tensor, seconds: float = 2.0) -> float:
    """Time of a forward and backward pass in bfloat16 relative to float32. The two alternate for about ``seconds``."""
    spent = {True: 0.0, False: 0.0}
    warm = False
    while sum(spent.values()) < seconds:
        for low in (True, False):
            synchronize(views.device)
            started = time.perf_counter()
            with torch.autocast(views.device.type, torch.bfloat16, enabled=low):
                features = backbone(views)
            features.float().sum().backward()
            synchronize(views.device)
            spent[low] += (time.perf_counter() - started) * warm
        warm = True
    backbone.zero_grad()
    return spent[True] / spent[False]


def _bf16(training: TrainingState, batch: Batch) -> float | None:
    """`compare_precisions` of the student on the first view; None if the recipe does not use float32."""
    recipe, device = training.recipe, training.accelerator.device
    if recipe.train.precision != "no":
        return None
    most = recipe.train.micro_batch or len(batch.sample_ids)
    pixels = finish_on(device, batch, recipe.views).views[0][:most]
    return compare_precisions(training.method.backbone, normalise(pixels, recipe.views.mean, recipe.views.std))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread, as in a data worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
