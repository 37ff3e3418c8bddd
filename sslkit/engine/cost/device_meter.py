"""How well a run uses its GPU: MFU, the share of time with work on the device, and peak memory."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sslkit.engine.cost.gpu_peaks import peak_flops
from sslkit.engine.cost.step_cost import count_step
from sslkit.engine.runtime.precision import chosen_precision
from sslkit.engine.state import TrainingState

GIB = 1 << 30
CUDA_EVENT = partial(torch.cuda.Event, enable_timing=True)
UNREAD = 10_000  # steps whose events are kept until a line of metrics is due


class DeviceMeter:
    """Measures the device of this process over a window of steps; nothing on CPUs. It never waits for the device.

    A CUDA event marks the start and the end of each step in the stream, and is read once the device has passed it.

    Args:
        device: The device of the steps.
        flops: FLOPs of a step on this process; 0 if they are not known.
        peak: FLOP/s that the device can reach; None if it is not known.
        make_event: Creates an event like `torch.cuda.Event`.
    """

    def __init__(
        self,
        device: torch.device,
        flops: int = 0,
        peak: float | None = None,
        make_event: Callable[[], Any] = CUDA_EVENT,
    ) -> None:
        self.device, self.flops, self.peak = device, flops, peak
        self.active = device.type == "cuda"
        self.make_event = make_event
        self.steps: deque[tuple[Any, Any]] = deque(maxlen=UNREAD)  # start and end of those that are not read yet
        self.open: Any = None  # start of the step that is being made
        self.read_up_to: Any = None  # end of the last step that was read

    def start_step(self) -> None:
        """Mark the start of a step in the stream."""
        if self.active:
            self.open = self._mark()

    def end_step(self) -> None:
        """Mark the end of the step, if one was started."""
        if self.open is not None:
            self.steps.append((self.open, self._mark()))
            self.open = None

    def restart(self) -> None:
        """Start a new window after an evaluation, which does not count."""
        self.steps.clear()
        self.open = self.read_up_to = None

    def read(self, steps_per_second: float) -> dict[str, float]:
        """The fields of a line of metrics, for the steps since the last call; empty on CPUs.

        Args:
            steps_per_second: The speed in this window, with the time of waiting for data.
        """
        if not self.active:
            return {}
        fields = {} if (busy := self._busy_share()) is None else {"device_busy": busy}
        if (mfu := self.mfu(steps_per_second)) is not None:
            fields["mfu"] = mfu
        fields["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
        torch.cuda.reset_peak_memory_stats(self.device)
        return fields

    def mfu(self, steps_per_second: float) -> float | None:
        """Model FLOPs utilization: the share of the peak that the model's FLOPs are; None if either is not known."""
        return self.flops * steps_per_second / self.peak if self.flops and self.peak else None

    def _mark(self) -> Any:
        event = self.make_event()
        event.record()
        return event

    def _busy_share(self) -> float | None:
        """Share of the time between the ends of two steps in which the device was inside a step; None if unknown."""
        begin, busy = self.read_up_to, 0.0
        while self.steps and self.steps[0][1].query():
            start, end = self.steps.popleft()
            begin = begin or start
            busy += start.elapsed_time(end)
            self.read_up_to = end
        total = begin.elapsed_time(self.read_up_to) if busy else 0.0
        return busy / total if total else None


def make_device_meter(state: TrainingState) -> DeviceMeter:
    """The meter of a run's first process, which writes the metrics. The FLOPs of a step are counted if they are needed.

    Without a known peak, or where the step of a method cannot be counted, there is no MFU.
    """
    accelerator, device = state.accelerator, state.accelerator.device
    if device.type != "cuda" or not accelerator.is_main_process:
        return DeviceMeter(torch.device("cpu"))
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    peak = peak_flops(torch.cuda.get_device_name(device), chosen_precision(state.recipe), tf32=tf32)
    return DeviceMeter(device, flops_of_step(state) if peak else 0, peak)


def flops_of_step(state: TrainingState) -> int:
    """FLOPs of a step on this process; 0 if they cannot be counted."""
    images = state.recipe.train.batch_size // state.accelerator.num_processes
    try:
        return count_step(state.recipe, images, low_precision=False).flops
    except Exception:  # a method of others may read values that fake tensors do not have
        return 0
