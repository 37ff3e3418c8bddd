"""The page: state, progress, alarms, and a curve for each number, in whatever room the terminal has."""

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sslkit.durations import duration
from sslkit.errors import counted
from sslkit.terminal import printed
from sslkit.watch.curve import ASCII_BARS, BARS, Curve, finite, sparkline
from sslkit.watch.followed_run import DIAGNOSES, KNN, WatchedRun
from sslkit.watch.run_state import newest_checkpoint, quiet_seconds

COLOURS = {"running": "green", "done": "green", "silent": "bold yellow", "stopped": "yellow", "killed": "bold red"}
COLOURS |= {"ended": "bold red"}
FIRST = ("loss", "accuracy", KNN, "lr", "grad_norm", "images_per_second", "data_wait", *DIAGNOSES)
SHARES = (KNN, "accuracy", "data_wait")  # shown in per cent
MOST_ALARMS, WIDEST_CURVE, WITH_RANGE = 4, 100, 72


@dataclass(frozen=True)
class Page:
    """A run as it is now, drawn to the width and height that a terminal has then."""

    run: WatchedRun

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What Rich asks for."""
        run, width = self.run, options.max_width
        opening = [_title(run), *_progress(run, width), *_remarks(run)]
        yield from opening
        used = sum(len(console.render_lines(each, options, pad=False)) for each in opening)
        room = max(options.size.height - used - 2, 1) if options.size.height and console.is_terminal else None
        bars = ASCII_BARS if options.ascii_only else BARS
        yield _curves(_in_order(run)[:room], width, bars)


def _title(run: WatchedRun) -> Text:
    state = run.state
    title = Text(printed(str(run.folder)), style="bold")
    if run.what:
        title.append(f"  {run.what}", style="not bold")
    title.append(f"\n{state.word}: ", style=COLOURS.get(state.word, "cyan"))
    return title.append(state.sentence, style="not bold")


def _progress(run: WatchedRun, width: int) -> list[Table | Text]:
    if not run.step:
        return []
    told = f"step {run.step}"
    bar = Table.grid()  # a bar alone ends no line
    if run.last_step:
        bar.add_row(ProgressBar(total=run.last_step, completed=run.step, width=min(width, WIDEST_CURVE)))
        told += f"/{run.last_step} ({min(run.step / run.last_step, 1):.0%})"
    told += f"  epoch {run.epoch:.4g}" + (f"/{run.epochs:g}" if run.epochs else "")
    if run.state.word in ("running", "silent"):
        if run.seconds_left is not None:
            told += f"  {duration(run.seconds_left)} left"
        told += f"  last line {duration(quiet_seconds(run.folder))} ago"
    if saved := newest_checkpoint(run.folder):
        told += f"  saved at {saved}"
    return [bar, Text(told)]


def _remarks(run: WatchedRun) -> list[Text]:
    said = [Text(f"ALARM {alarm}", style="bold red") for alarm in run.alarms[:MOST_ALARMS]]
    standing = {alarm.partition(":")[0] for alarm in run.alarms}
    if past := [kind for kind in run.past_alarms if kind not in standing]:
        said.append(Text(f"alarms that no longer stand: {', '.join(past[:MOST_ALARMS])}", style="yellow"))
    if wrong := [name for name, curve in run.metrics.items() if curve.newest is None]:
        said.append(Text(f"not finite in the newest line: {printed(', '.join(wrong))}", style="bold red"))
    if run.skipped:
        said.append(Text(f"{counted(run.skipped, 'step')} with bad numbers left out", style="yellow"))
    if run.bad_images:
        said.append(Text(f"{counted(run.bad_images, 'image')} cannot be read: see bad_samples.jsonl", style="yellow"))
    if odd := {name: count for name, count in run.odd.items() if count}:
        counts = ", ".join(f"{count} of {name}.jsonl" for name, count in odd.items())
        said.append(Text(f"lines left out, which lack what a row must have: {counts}", style="yellow"))
    return said + [Text(score) for score in run.scores]


def _in_order(run: WatchedRun) -> list[tuple[str, Curve]]:
    """The numbers that matter most first: a low terminal cuts the last."""
    numbers = {**run.metrics, **({KNN: run.knn} if run.knn.means else {}), **run.diagnoses}
    return sorted(numbers.items(), key=lambda each: FIRST.index(each[0]) if each[0] in FIRST else len(FIRST))


def _curves(rows: list[tuple[str, Curve]], width: int, bars: str) -> Table:
    names = min(max((len(name) for name, _ in rows), default=0), max(width // 3, 8))
    with_range = width >= WITH_RANGE
    room = width - names - 11 - (24 if with_range else 0) - 2
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=names, no_wrap=True, overflow="ellipsis")
    table.add_column(width=10, justify="right", no_wrap=True)
    table.add_column(no_wrap=True, style="cyan")
    for name, curve in rows:
        told = f"{_short(name, curve.lowest)} to {_short(name, curve.highest)}" if curve.means and with_range else ""
        line = sparkline(curve.points(min(max(room, 1), WIDEST_CURVE)), bars)
        table.add_row(Text(printed(name)), Text(_short(name, curve.newest)), Text(line), Text(told, style="dim"))
    return table


def _short(name: str, value: float | None) -> str:
    if finite(value) is None or value is None:
        return "none"
    return f"{value:.1%}" if name in SHARES else f"{value:.4g}"
