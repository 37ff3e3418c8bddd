"""The latest steps of a run, whose numbers the device has not told yet.

While a GPU computes a step, the host starts the next ones and reads the numbers of an earlier one. A bad step is found
late then, but it has no effect: the GPU itself keeps it, and all steps after it, from weights, teacher and queue. Once
the host knows, it undoes the rest and makes the steps after it again from the same batches. A run with a lag therefore
does what one without does, bit for bit.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from sslkit.data.batch import Batch
from sslkit.engine.resilience.guard import Guard
from sslkit.engine.state import TrainingState
from sslkit.engine.step import StepInFlight, StepResult, finish_step, guard_of, start_step


class StepsInFlight:
    """Starts steps, and hands over their results in order.

    Args:
        state: Its ``step`` counts the steps that were started.
        guard: Of this run.
        poll: Called with each batch; see `sslkit.engine.step.train_step`.
        report: Called with the result of each step.
    """

    def __init__(
        self,
        state: TrainingState,
        guard: Guard,
        poll: Callable[[Batch], tuple[bool, ...]],
        report: Callable[[StepResult], None],
    ) -> None:
        self.state, self.guard, self.poll, self.report = state, guard, poll, report
        self.steps: deque[StepInFlight] = deque()
        self.last_views: Sequence[Tensor] = ()  # of the step started last, on the device

    def start(self, batch: Batch) -> None:
        """Start the step of a batch."""
        self.steps.append(start_step(self.state, batch, self.guard, partial(self.poll, batch)))
        self.last_views = self.steps[-1].batch.views

    def finish(self, *, all_steps: bool) -> None:
        """Report the steps that are due: all but the latest ``state.lag``, or ``all_steps``."""
        while len(self.steps) > (0 if all_steps else self.state.lag):
            started = self.steps.popleft()
            result = finish_step(self.state, self.guard, started)
            if not result.skipped:
                self.report(result)
                continue
            later = [step.batch for step in self.steps]
            self.steps.clear()
            self.state.step = result.step + 1
            self.report(result)
            for batch in later:
                self.start(batch)


def steps_to_measure(state: TrainingState) -> StepsInFlight:
    """The steps of a run without a run folder: nothing is reported, and no process asks for anything."""
    return StepsInFlight(state, guard_of(state), lambda _batch: (False, False, False), lambda _result: None)
