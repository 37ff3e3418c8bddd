"""The state of a run, derived from its folder: waiting, running, stopped on request, killed or done."""

from dataclasses import dataclass

from sslkit.files.run_reader import RunReader
from sslkit.text import format_duration

SILENT_SECONDS, SILENT_LINES = 60.0, 20.0
CONTINUES = "the same command continues it"


@dataclass(frozen=True)
class State:
    """The state of a run, and the same as a sentence.

    It is ``waiting`` (no run yet), ``starting``, ``running``, ``silent`` for too long, ``stopped`` on request,
    ``done``, ``killed``, or ``ended`` by an error.
    """

    name: str
    message: str


def state_of(run: RunReader, step: int, last_step: int, seconds_per_line: float) -> State:
    """Derive the state from the lock, the stop marker, the times of the files, and the step of the newest row.

    ``seconds_per_line`` is the usual time between two rows of metrics. A number that is not known is 0.
    """
    held, holder = run.lock()
    if held:
        idle = run.idle_seconds()
        if idle > max(SILENT_SECONDS, SILENT_LINES * seconds_per_line):
            usual = f" (usually every {format_duration(seconds_per_line)})" if seconds_per_line >= 1 else ""
            wrote = f"{holder} has written nothing for {format_duration(idle)}{usual}"
            return State("silent", f"{wrote}: it evaluates, waits or hangs")
        return State("running", holder) if step else State("starting", f"{holder}, no line of metrics yet")
    if marker := run.stop_marker():
        return State("stopped", f"stopped at {marker}; {CONTINUES}")
    saved = run.latest_step() or 0
    if last_step and saved >= last_step:
        return State("done", f"all {last_step} steps done and saved")
    if holder:
        return State("killed", f"{holder} was killed; {CONTINUES} from step {saved}")
    if not run.is_run:
        return State("waiting", "no run here yet")
    return State("ended", f"no process is training here; {CONTINUES} from step {saved}")
