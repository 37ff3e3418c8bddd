"""The page of a run: state, progress, alarms, and one curve per number, fitted to the size of the terminal."""

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sslkit.terminal import sanitize
from sslkit.text import format_duration, pluralize
from sslkit.watch.terminal_curve import ASCII_BARS, BARS, Curve, sparkline
from sslkit.watch.watched_run import DIAGNOSTICS, KNN, WatchedRun

COLOURS = {"running": "green", "done": "green", "silent": "bold yellow", "stopped": "yellow", "killed": "bold red"}
COLOURS |= {"ended": "bold red"}
GPU = ("mfu", "device_busy", "peak_memory_gib")  # of runs on GPUs
FIRST = ("loss", "accuracy", KNN, "lr", "grad_norm", "images_per_second", "data_wait", *GPU, *DIAGNOSTICS)
PERCENTAGES = (KNN, "accuracy", "data_wait", "mfu", "device_busy")
MAX_ALARMS, MAX_CURVE_WIDTH, RANGE_WIDTH = 4, 100, 72


@dataclass(frozen=True)
class Page:
    """The page of a run, drawn by Rich to the current width and height of the terminal."""

    run: WatchedRun

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Rich's protocol."""
        run, width = self.run, options.max_width
        header = [_title(run), *_progress(run, width), *_remarks(run)]
        yield from header
        used = sum(len(console.render_lines(each, options, pad=False)) for each in header)
        rows = max(options.size.height - used - 2, 1) if options.size.height and console.is_terminal else None
        bars = ASCII_BARS if options.ascii_only else BARS
        yield _curves(_by_importance(run)[:rows], width, bars)


def _title(run: WatchedRun) -> Text:
    state = run.state
    title = Text(sanitize(str(run.folder)), style="bold")
    if run.title:
        title.append(f"  {run.title}", style="not bold")
    title.append(f"\n{state.name}: ", style=COLOURS.get(state.name, "cyan"))
    return title.append(state.message, style="not bold")


def _progress(run: WatchedRun, width: int) -> list[Table | Text]:
    if not run.step:
        return []
    text = f"step {run.step}"
    bar = Table.grid()  # a ProgressBar alone does not end its line
    if run.last_step:
        bar.add_row(ProgressBar(total=run.last_step, completed=run.step, width=min(width, MAX_CURVE_WIDTH)))
        text += f"/{run.last_step} ({min(run.step / run.last_step, 1):.0%})"
    text += f"  epoch {run.epoch:.4g}" + (f"/{run.epochs:g}" if run.epochs else "")
    if run.state.name in ("running", "silent"):
        if run.seconds_left is not None:
            text += f"  {format_duration(run.seconds_left)} left"
        text += f"  last write {format_duration(run.reader.idle_seconds())} ago"
    if saved := run.reader.latest_step():
        text += f"  saved at step {saved}"
    return [bar, Text(text)]


def _remarks(run: WatchedRun) -> list[Text]:
    remarks = [Text(f"ALARM {alarm}", style="bold red") for alarm in run.alarms[:MAX_ALARMS]]
    active = {alarm.partition(":")[0] for alarm in run.alarms}
    if past := [kind for kind in run.past_alarms if kind not in active]:
        remarks.append(Text(f"alarms that are no longer active: {', '.join(past[:MAX_ALARMS])}", style="yellow"))
    if not_finite := [name for name, curve in run.metrics.items() if curve.newest is None]:
        remarks.append(Text(f"not finite in the newest line: {sanitize(', '.join(not_finite))}", style="bold red"))
    if run.skipped:
        remarks.append(Text(f"{pluralize(run.skipped, 'step')} with non-finite numbers skipped", style="yellow"))
    if run.bad_images:
        images = pluralize(run.bad_images, "unreadable image")
        remarks.append(Text(f"{images}, listed in bad_samples.jsonl", style="yellow"))
    if invalid := [f"{count} of {name}.jsonl" for name, count in run.invalid.items() if count]:
        remarks.append(Text(f"invalid lines skipped: {', '.join(invalid)}", style="yellow"))
    return remarks + [Text(score) for score in run.scores]


def _by_importance(run: WatchedRun) -> list[tuple[str, Curve]]:
    """The curves, the most important first: a short terminal shows only these."""
    curves = {**run.metrics, **({KNN: run.knn} if run.knn.means else {}), **run.diagnostics}
    return sorted(curves.items(), key=lambda item: FIRST.index(item[0]) if item[0] in FIRST else len(FIRST))


def _curves(rows: list[tuple[str, Curve]], width: int, bars: str) -> Table:
    name_width = min(max((len(name) for name, _ in rows), default=0), max(width // 3, 8))
    curve_width = width - name_width - 13 - (24 if width >= RANGE_WIDTH else 0)
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=name_width, no_wrap=True, overflow="ellipsis")
    table.add_column(width=10, justify="right", no_wrap=True)
    table.add_column(no_wrap=True, style="cyan")
    for name, curve in rows:
        has_range = curve.means and width >= RANGE_WIDTH
        shown_range = f"{_format(name, curve.lowest)} to {_format(name, curve.highest)}" if has_range else ""
        line = sparkline(curve.points(min(max(curve_width, 1), MAX_CURVE_WIDTH)), bars)
        table.add_row(Text(sanitize(name)), Text(_format(name, curve.newest)), Text(line), Text(shown_range, "dim"))
    return table


def _format(name: str, value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.1%}" if name in PERCENTAGES else f"{value:.4g}"
