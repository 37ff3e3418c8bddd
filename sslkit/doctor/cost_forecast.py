"""What a run of this recipe will cost here: memory, time, and who waits for whom. Forecasts, and said to be."""

import os
import statistics
import time

import torch

from sslkit.data.augment.cpu import ViewPipeline
from sslkit.data.loading.loader import cores_of_a_process, make_loader, resolve_workers
from sslkit.data.order.sampler import GlobalBatchSampler
from sslkit.data.sources.image_source import ImageSource
from sslkit.doctor.diagnosed_setup import Observation, Patient, processes_of
from sslkit.doctor.findings import Finding, ok, warning
from sslkit.doctor.machine_checks import GIB, has_bf16, memory_of_device, training_device
from sslkit.engine.accelerator import processes_here
from sslkit.parts.batchnorm import has_batch_norm
from sslkit.recipe.resolve import Recipe
from sslkit.text import format_duration, pluralize

MEMORY, LOADING, THREADS, PRECISION, SLICES = "memory", "data loading", "threads", "precision", "slices"

OPTIMIZER_COPIES = {"sgd": 1, "lars": 1, "lars_simclr": 1, "larc": 1, "adamw": 2, "lamb": 2}
HALF_PRECISION = 0.6  # of float32's activations: norms and losses stay in float32
CUDA_ITSELF = GIB
ROUNDS, TILED = 2, 4
LONG_STEP = 3.0  # seconds from which a step is not repeated for its time


def forecast_memory(patient: Patient, seen: Observation) -> Finding:
    """Weights, gradients, optimizer, queue or bank, and what autograd keeps, scaled up from a small batch."""
    recipe, device = patient.recipe, training_device()
    local = max(recipe.train.batch_size // processes_of(recipe), 1)
    at_once = min(recipe.train.micro_batch or local, local)
    state, learning = _state_bytes(patient)
    for_one = seen.saved_bytes / patient.batch * (HALF_PRECISION if recipe.train.precision != "no" else 1.0)
    sharing = processes_here() if device.type == "cpu" else 1
    fixed = state + learning + (CUDA_ITSELF if device.type == "cuda" else 0)
    needed, there = fixed + for_one * at_once, memory_of_device(device) // sharing
    said = (
        f"forecast {_gib(needed)} a process of {_gib(there)}: {_gib(state)} for weights, teacher and dictionary, "
        f"{_gib(learning)} for gradients and optimizer, {_gib(for_one * at_once)} for {at_once} images at once"
    )
    if needed < 0.9 * there:
        return ok(MEMORY, said)
    fitting = int(max(0.8 * there - fixed, 0) / max(for_one, 1))
    slices = next((size for size in range(min(fitting, local), 1, -1) if local % size == 0), 0)
    cure = f"[train] micro_batch = {slices}, or more processes" if slices else "a smaller backbone or more memory"
    return warning(MEMORY, f"{said}; it will not fit. Take {cure}")


def _gib(size: float) -> str:
    return f"{size / GIB:.2g} GiB" if size < 100 * GIB else f"{size / GIB:.0f} GiB"


def _span(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else format_duration(seconds)


def _state_bytes(patient: Patient) -> tuple[int, int]:
    method = patient.method
    tensors = [*method.parameters(), *method.buffers()]
    trained = sum(param.numel() * param.element_size() for param in method.parameters() if param.requires_grad)
    state = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return state, trained * (1 + OPTIMIZER_COPIES[patient.recipe.optim.name])


def weigh_loading(patient: Patient, source: ImageSource, seen: Observation) -> Finding:
    """Time loading and computing by turns; a step that took long is not repeated for it."""
    recipe, device = patient.recipe, training_device()
    if seen.seconds > LONG_STEP and device.type == "cpu":
        return judge_speed(recipe, seen.seconds / patient.batch, patient.loading_seconds / patient.batch, len(source))
    there = on_device(patient, device)
    pipeline = ViewPipeline(recipe.views, recipe.train.seed)
    batches = GlobalBatchSampler(len(source), patient.batch, recipe.train.seed, total_steps=ROUNDS, plan=source.plan)
    loader = iter(make_loader(source, pipeline, batches, workers=0, pin_memory=False))
    computing, loading = [], []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        next(loader)
        loading.append((time.perf_counter() - started) / patient.batch)
        computing.append(there.observe(backward=True).seconds / there.batch)
    return judge_speed(recipe, statistics.median(computing), statistics.median(loading), len(source))


def on_device(patient: Patient, device: torch.device) -> Patient:
    """The same patient where the run will compute; a GPU gets the images several times over, to be kept busy."""
    times = 1 if device.type == "cpu" else TILED
    views = [view.repeat(times, 1, 1, 1).to(device) for view in patient.views]
    sample_ids = patient.sample_ids.repeat(times).to(device)
    return Patient(patient.recipe, patient.method.to(device), views, sample_ids, patient.loading_seconds)


def judge_speed(recipe: Recipe, computing: float, loading: float, images: int) -> Finding:
    """Who waits for whom, and how long the run would take here.

    Args:
        recipe: Batch, epochs and workers.
        computing: Seconds of a step, for each of its images.
        loading: Seconds to read an image and cut its views on one core.
        images: In the data.
    """
    train, processes, on_cpu = recipe.train, processes_of(recipe), training_device().type == "cpu"
    workers = resolve_workers(recipe.data.workers, on_accelerator=not on_cpu, processes_here=processes)
    local = train.batch_size // processes
    compute, load = computing * local, loading * local / max(workers, 1)
    step = max(compute, load) if workers else compute + load
    steps = train.epochs * (images // train.batch_size)
    said = (
        f"a step of {local} images takes about {_span(compute)} to compute and {_span(load)} to load with "
        f"{pluralize(workers, 'worker')}; {steps} steps are about {format_duration(step * steps)} on this machine"
    )
    if load > compute:
        return warning(
            LOADING,
            f"data-loader bound: {said}. More [data] workers (and cores), smaller stored images or lighter [views] "
            "would speed it up, faster computing would not",
        )
    return ok(LOADING, f"compute bound: {said}")


def check_threads(recipe: Recipe) -> Finding:
    """Workers and computing threads must not fight for cores."""
    cores, on_cpu = cores_of_a_process(1), training_device().type == "cpu"
    processes = processes_here()
    workers = processes * resolve_workers(recipe.data.workers, on_accelerator=not on_cpu, processes_here=processes)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = processes * int(asked) if on_cpu and asked.isdigit() else 0
    computing = pluralize(threads or max(cores - workers, 1), "computing thread") if on_cpu else "a GPU"
    shared, held = f"{pluralize(workers, 'data worker')} and {computing}", pluralize(cores, "core")
    if workers > cores or threads > cores:
        return warning(THREADS, f"{shared} share {held}; take fewer")
    if threads and cores - workers > 3 * threads:
        return warning(
            THREADS, f"OMP_NUM_THREADS = {asked} leaves {cores - workers - threads} of {held} idle; unset it"
        )
    return ok(THREADS, f"{shared} on {held}")


def check_precision(recipe: Recipe) -> Finding:
    """Whether this machine has the recipe's precision."""
    device, precision = training_device(), recipe.train.precision
    if precision == "fp16" and device.type == "cpu":
        return warning(PRECISION, "'fp16' needs a GPU, and there is none here: the run would be refused")
    if precision == "bf16" and not has_bf16(device):
        return warning(
            PRECISION, "'bf16' is not native here and slower than float32; [train] precision = 'no' on this machine"
        )
    return ok(PRECISION, "float32" if precision == "no" else f"{precision}, native here")


def check_slices(patient: Patient) -> Finding:
    """Slices have batch statistics of their own; without shuffled keys they mark who belongs together."""
    method, micro = patient.method, patient.recipe.train.micro_batch
    if not micro or not has_batch_norm(method.backbone):
        return ok(SLICES, "none" if not micro else "exact: the backbone has no batch statistics")
    if micro < 8:
        return warning(
            SLICES, f"[train] micro_batch = {micro}: too few images for BatchNorm's statistics; take 8 or more"
        )
    if method.bn_groups > 1 and not method.shuffle_keys:
        return warning(
            SLICES,
            f"[train] micro_batch = {micro} gives every slice batch statistics of its own, and this method does not "
            "shuffle keys: the statistics tell a positive from most negatives. Take a backbone without BatchNorm, or "
            "more processes",
        )
    return ok(SLICES, f"of {micro} images, each with batch statistics of its own")
