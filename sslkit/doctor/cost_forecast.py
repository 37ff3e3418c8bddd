"""Forecasts of a run on this machine: memory, time, and whether computing waits for data; threads and precision."""

import os
import statistics
import time

import torch

from sslkit.data.loading.loader import cores_of_a_process, resolve_workers
from sslkit.data.sources.image_source import ImageSource
from sslkit.doctor.doctor_setup import DoctorSetup, StepRecord, load_batches, num_processes
from sslkit.doctor.findings import LOADING, MEMORY, Check, Finding
from sslkit.doctor.machine_checks import GIB, has_bf16, memory_of_device
from sslkit.engine.accelerator import processes_here
from sslkit.engine.optim import OPTIMIZER_COPIES
from sslkit.engine.runtime.precision import chosen_precision, describe_precision, training_device
from sslkit.recipe.resolve import Recipe
from sslkit.text import format_duration, pluralize

THREADS, PRECISION = map(Check, ("threads", "precision"))

HALF_PRECISION = 0.6  # of float32's activations, as norms and losses stay in float32
CUDA_CONTEXT = GIB
REPEATS, GPU_COPIES = 2, 4
LONG_STEP = 3.0  # seconds; a longer step is not repeated to measure its time


def forecast_memory(setup: DoctorSetup, record: StepRecord) -> Finding:
    """Weights, gradients, optimizer state, dictionaries, and activations scaled up from a small batch."""
    recipe, method, device = setup.recipe, setup.method, training_device()
    local = max(recipe.train.batch_size // num_processes(recipe), 1)
    at_once = min(recipe.train.micro_batch or local, local)
    state = sum(tensor.numel() * tensor.element_size() for tensor in [*method.parameters(), *method.buffers()])
    trained = sum(param.numel() * param.element_size() for param in method.parameters() if param.requires_grad)
    updates = trained * (1 + OPTIMIZER_COPIES[recipe.optim.name])
    share = HALF_PRECISION if chosen_precision(recipe) != "no" else 1.0
    per_image = record.activation_bytes / setup.batch_size * share
    fixed = state + updates + (CUDA_CONTEXT if device.type == "cuda" else 0)
    needed = fixed + per_image * at_once
    available = memory_of_device(device) // (processes_here() if device.type == "cpu" else 1)
    sentence = (
        f"about {_gib(needed)} of {_gib(available)} for each process: {_gib(state)} for weights, teachers and "
        f"dictionaries, {_gib(updates)} for gradients and optimizer, {_gib(per_image * at_once)} for the activations "
        f"of {pluralize(at_once, 'image')}"
    )
    if needed < 0.9 * available:
        return MEMORY.ok(sentence)
    fitting = int(max(0.8 * available - fixed, 0) / max(per_image, 1))
    micro_batch = next((size for size in range(min(fitting, local), 1, -1) if local % size == 0), 0)
    cure = f"set train.micro_batch = {micro_batch}" if micro_batch else "use a smaller backbone"
    return MEMORY.warning(f"the run needs {sentence}. This does not fit: {cure}, or use more processes")


def _gib(size: float) -> str:
    return f"{size / GIB:.2g} GiB" if size < 100 * GIB else f"{size / GIB:.0f} GiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else format_duration(seconds)


def forecast_time(setup: DoctorSetup, source: ImageSource, record: StepRecord) -> Finding:
    """Measure loading and computing in turn, and compare them."""
    recipe, device = setup.recipe, training_device()
    if record.seconds > LONG_STEP and device.type == "cpu":
        computing, loading = record.seconds, setup.loading_seconds
        return compare_speeds(recipe, computing / setup.batch_size, loading / setup.batch_size, len(source))
    moved = on_device(setup, device)
    batches = load_batches(recipe, source, setup.batch_size, steps=REPEATS)
    computing_times, loading_times = [], []
    for _ in range(REPEATS):
        started = time.perf_counter()
        next(batches)
        loading_times.append((time.perf_counter() - started) / setup.batch_size)
        computing_times.append(moved.run_step(backward=True).seconds / moved.batch_size)
    computing, loading = statistics.median(computing_times), statistics.median(loading_times)
    return compare_speeds(recipe, computing, loading, len(source))


def on_device(setup: DoctorSetup, device: torch.device) -> DoctorSetup:
    """The setup on the device that the run uses; on a GPU with several copies of the images, to fill it better."""
    copies = 1 if device.type == "cpu" else GPU_COPIES
    views = [view.repeat(copies, 1, 1, 1).to(device) for view in setup.views]
    sample_ids = setup.sample_ids.repeat(copies).to(device)
    return DoctorSetup(setup.recipe, setup.method.to(device), views, sample_ids, setup.loading_seconds)


def compare_speeds(recipe: Recipe, computing: float, loading: float, num_images: int) -> Finding:
    """Compare the time to load a batch with the time to compute it, and forecast the time of the run.

    ``computing`` and ``loading`` are seconds for an image, loading on one core; ``num_images`` are those of the data.
    """
    train, processes, on_cpu = recipe.train, num_processes(recipe), training_device().type == "cpu"
    workers = resolve_workers(recipe.data.workers, on_accelerator=not on_cpu, processes_here=processes)
    local = train.batch_size // processes
    compute, load = computing * local, loading * local / max(workers, 1)
    step = max(compute, load) if workers else compute + load
    steps = train.epochs * (num_images // train.batch_size)
    sentence = (
        f"{pluralize(steps, 'step')} take about {format_duration(step * steps)} on this machine: a step of {local} "
        f"images takes about {_seconds(compute)} to compute and {_seconds(load)} to load with "
        f"{pluralize(workers, 'data worker')}"
    )
    if load <= compute:
        return LOADING.ok(sentence)
    needed = max(round(loading / computing), workers + 1)
    return LOADING.warning(
        f"{sentence}. Computing waits for data: set data.workers = {needed} if there are so many cores, or pack the "
        f"images with sslkit prepare {recipe.data.path} packed"
    )


def check_threads(recipe: Recipe) -> Finding:
    """Compare data workers and computing threads with the cores."""
    cores, on_cpu = cores_of_a_process(1), training_device().type == "cpu"
    processes = processes_here()
    workers = processes * resolve_workers(recipe.data.workers, on_accelerator=not on_cpu, processes_here=processes)
    variable = os.environ.get("OMP_NUM_THREADS", "")
    threads = processes * int(variable) if on_cpu and variable.isdigit() else 0
    computing = pluralize(threads or max(cores - workers, 1), "computing thread") if on_cpu else "a GPU"
    sentence = f"{pluralize(workers, 'data worker')} and {computing} on {pluralize(cores, 'core')}"
    if workers > cores:
        return THREADS.warning(f"{sentence}: set data.workers = {max(cores // processes - 1, 1)}")
    if threads > cores:
        return THREADS.warning(f"{sentence}: set OMP_NUM_THREADS={max(cores // processes, 1)}")
    if threads and cores - workers > 3 * threads:
        idle = pluralize(cores - workers - threads, "core")
        return THREADS.warning(f"{sentence}: OMP_NUM_THREADS={variable} leaves {idle} idle; unset it")
    return THREADS.ok(sentence)


def check_precision(recipe: Recipe) -> Finding:
    """Whether this machine supports the recipe's precision."""
    device, precision = training_device(), recipe.train.precision
    if precision == "fp16" and device.type == "cpu":
        return PRECISION.warning('fp16 needs a GPU, and this machine has none: set train.precision = "no"')
    if precision == "bf16" and not has_bf16(device):
        return PRECISION.warning('bf16 is emulated on this machine and slower than float32: set train.precision = "no"')
    if precision in ("no", "auto"):
        return PRECISION.ok(describe_precision(recipe))
    return PRECISION.ok(f"{precision}, supported by this machine")
