"""A trace of a few training steps, for Perfetto (https://ui.perfetto.dev) or chrome://tracing."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as record

from sslkit.engine.setup import make_train_loader
from sslkit.engine.state import TrainingState
from sslkit.engine.steps_in_flight import steps_to_measure
from sslkit.errors import UserError, check_path
from sslkit.files.atomic import replace_file
from sslkit.profiling.stage_timer import STAGES, StageTimer, synchronize, timed
from sslkit.profiling.step_profile import CPU, ENDLESS, step

UNRECORDED, RECORDED = 2, 3  # steps
SUFFIXES = (".json.gz", ".json")
WAITING, STEP = "waiting for data", "step"
MARKS = {WAITING, STEP, *STAGES}  # on a GPU a mark is an event of the device too, from its first kernel to its last


class StageMarks(StageTimer):
    """Names the stages in a trace; it measures nothing and never waits for the device."""

    def stage(self, name: str) -> record_function:  # type: ignore[override]
        """Mark the time inside this context."""
        return record_function(name)


def check_trace(file: Path) -> None:
    """Raise a UserError if a trace cannot be written to ``file``."""
    check_path(file, "--trace")
    if not file.name.endswith(SUFFIXES):
        raise UserError(f"--trace {file}: must end in {' or '.join(SUFFIXES)}, such as trace.json.gz")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK) or file.is_dir():
        raise UserError(f"--trace {file}: cannot be written there; give a file in a folder that exists")


def write_trace(training: TrainingState, file: Path) -> float | None:
    """Record `RECORDED` steps of a training state that has made steps before; the first process writes them.

    All processes call it together.

    Returns:
        The share of the time in which kernels or copies ran on the GPU; None on CPUs, and on all processes but the
        first.
    """
    device, in_flight = training.accelerator.device, steps_to_measure(training)
    batches = iter(make_train_loader(training, ENDLESS))
    for _ in range(UNRECORDED):
        step(training, next(batches), in_flight, StageTimer(CPU))
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    synchronize(device)
    with record(activities=activities) as recorded, timed(training, StageMarks(device)) as marks:
        for _ in range(RECORDED):
            with record_function(STEP):
                with record_function(WAITING):
                    batch = next(batches)
                step(training, batch, in_flight, marks)
        synchronize(device)
    if not training.accelerator.is_main_process:
        return None
    _write(recorded, file)
    if not on_gpu:
        return None
    events = recorded.events() or []
    kernels = [each.time_range for each in events if each.device_type.name == "CUDA" and each.name not in MARKS]
    steps = [each.time_range for each in events if each.device_type.name == "CPU" and each.name == STEP]
    spans = [(each.start, each.end) for each in kernels]
    return busy_share(spans, min(each.start for each in steps)) if spans else None


def busy_share(spans: Iterable[tuple[float, float]], begin: float) -> float:
    """Share of the time from ``begin`` to the end of the last span that is covered by spans, which may overlap."""
    covered, reached = 0.0, begin
    for start, end in sorted(spans):
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered / (reached - begin)


def _write(recorded: torch.profiler.profile, file: Path) -> None:
    try:
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / file.name
            recorded.export_chrome_trace(str(temporary))
            replace_file(file, [temporary.read_bytes()])
    except OSError as error:
        raise UserError(f"--trace {file}: cannot be written: {error.strerror or error}") from error
