"""``sslkit doctor`` and ``sslkit bench``: check a recipe before training, and measure the speed of its steps."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from sslkit.cli.options import RecipeOptions, fast_imports
from sslkit.cli.output import AsJson, console
from sslkit.terminal import PlainTable, print_json, print_line, print_message
from sslkit.text import pluralize

if TYPE_CHECKING:
    from sslkit.doctor import Report
    from sslkit.profiling import Change, Profile

FAULT_FOUND = 2  # exit code
BAR_WIDTH = 24  # characters


def doctor(
    recipe: RecipeOptions,
    every: Annotated[bool, typer.Option("--all", help="List every check, also those that are ok.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a recipe with its own data. Without a recipe, report the devices and memory of this machine.

    Exits with code 2 if there is a fault, and with 0 if there are only warnings. Writes nothing to disk.
    """
    with fast_imports():
        from sslkit.doctor import Report, check_machine, check_recipe

    of_recipe = recipe != RecipeOptions()
    if of_recipe:
        loaded = recipe.load()
        report = check_recipe(loaded, lambda stage: print_message(f"{stage} ..."))
    else:
        report = Report(check_machine())
    if report.findings:
        print_findings(report, as_json, every=every or not of_recipe)
    if report.of("fault"):
        raise typer.Exit(FAULT_FOUND)


def print_findings(report: "Report", as_json: bool, *, every: bool) -> None:
    """Print the findings of the doctor: as a table, or all of them as JSON, in their own order.

    The table has time, memory, faults and warnings, and the settings that these advise follow it. With ``every`` it
    has the checks that are ok too.
    """
    counts = {verdict: len(report.of(verdict)) for verdict in ("fault", "warning", "ok")}
    if as_json:
        print_json({**counts, "findings": [dataclasses.asdict(finding) for finding in report.findings]})
        return
    colours = {"fault": "bold red", "warning": "yellow", "ok": "green"}
    costs, fine = report.costs(), report.of("ok")
    shown = [*costs, *report.of("fault"), *report.of("warning"), *(fine if every else [])]
    if shown:
        table = PlainTable("check", "verdict", "finding")
        for finding in dict.fromkeys(shown):
            table.add_row(finding.check, Text(finding.verdict, colours[finding.verdict]), finding.sentence)
        console.print(table)
    if report.settings():
        print_line(report.settings_line())
    skipped = [finding.check for finding in report.of("not applicable")]
    total = f"{pluralize(counts['fault'], 'fault')}, {pluralize(counts['warning'], 'warning')}"
    if every:
        print_line("not applicable: " + (", ".join(skipped) or "none"))
        print_line(f"{total}, {counts['ok']} ok")
        return
    hidden = len(set(fine) - set(costs))
    ok = f"{pluralize(hidden, 'other check is', 'other checks are')} ok"
    print_line(f"{total}; {ok}, {len(skipped)} not applicable (--all lists them)")


def bench(
    recipe: RecipeOptions,
    seconds: Annotated[float, typer.Option(min=1.0, max=3600.0, help="Approximate duration in seconds.")] = 20.0,
    trace: Annotated[str, "Also write a trace of three steps to this file, such as trace.json.gz, for Perfetto."] = "",
    as_json: AsJson = False,
) -> None:
    """Measure the time of each stage of a recipe's training step, and suggest the changes that help most.

    For several processes, start it with torchrun or accelerate launch, like the run itself. Writes nothing to disk but
    the file of --trace, which https://ui.perfetto.dev opens.
    """
    with fast_imports():
        from sslkit.profiling import changes_that_help, check_trace, profile, write_trace

    loaded = recipe.load()
    if trace:
        check_trace(Path(trace))
    tracing = partial(write_trace, file=Path(trace)) if trace else None
    measured = profile(loaded, seconds, trace=tracing)
    changes = changes_that_help(measured, loaded)
    if measured.process:
        return
    if as_json:
        fields = {**dataclasses.asdict(measured), "images_per_second": measured.images_per_second}
        print_json({**fields, "changes": [dataclasses.asdict(each) for each in changes]})
        return
    _print_profile(measured, changes)
    if trace:
        print_line(f"trace of three steps: {trace}; open it at https://ui.perfetto.dev")


def _print_profile(measured: "Profile", changes: "list[Change]") -> None:
    from sslkit.profiling.speed_advice import share_of_passes

    print_line(
        f"{measured.images_per_second:.4g} images/s: a step of {measured.batch} images per process on "
        f"{pluralize(measured.processes, 'process', 'processes')} takes {_format_time(measured.step)} "
        f"({measured.device}, {pluralize(measured.steps, 'step')})"
    )
    table = PlainTable("stage", "ms", "share", "")
    for name, spent in [("waiting for data", measured.waiting), *measured.stages.items()]:
        share = spent / measured.step
        table.add_row(name, f"{1e3 * spent:.1f}", f"{share:.1%}", "█" * round(BAR_WIDTH * min(share, 1.0)))
    console.print(table)
    images = measured.images
    unreadable = f", without {pluralize(images.unreadable, 'unreadable image')}" if images.unreadable else ""
    print_line(
        f"CPU time of one image: {_format_time(images.seconds)} (reading {_format_time(images.read)}, decoding "
        f"{_format_time(images.decode)}, views {_format_time(images.views)}; mean of {images.images}{unreadable}); "
        f"{pluralize(measured.workers, 'data worker')} per process, {pluralize(measured.cores, 'core')}"
    )
    if measured.peak_bytes is not None:
        print_line(f"peak device memory: {measured.peak_bytes / 2**30:.2f} GiB")
    if measured.mfu is not None:
        print_line(f"model FLOPs utilization (MFU): {measured.mfu:.1%} of the device's peak at this precision")
    if measured.gpu_busy is not None:
        print_line(f"kernels and copies run on the GPU in {measured.gpu_busy:.1%} of the time")
    for number, change in enumerate(changes):
        opening = "most effective change" if number == 0 else "also"
        print_line(f"{opening}: {change.what} ({change.gain:.2f} x as fast)")
    if not changes:
        print_line(f"no change would help much: forward and backward take {share_of_passes(measured):.0%} of a step")


def _format_time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
