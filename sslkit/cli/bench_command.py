"""``sslkit bench``: a table of where a step's time goes, and what to change."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from sslkit.cli.options import Backbone, Images, MethodName, Overrides, RecipeName, recipe_from_words
from sslkit.cli.output import AsJson, console
from sslkit.cli.startup import quick_imports
from sslkit.errors import counted
from sslkit.terminal import PlainTable, show, show_json

if TYPE_CHECKING:
    from sslkit.profiling import Change, Profile

BAR = 24  # characters


def bench(
    recipe: RecipeName = "",
    overrides: Overrides = None,
    method: MethodName = "",
    backbone: Backbone = "",
    data: Images = "",
    seconds: Annotated[float, typer.Option(min=1.0, max=3600.0, help="About how long to measure.")] = 20.0,
    as_json: AsJson = False,
) -> None:
    """Measure where a recipe's step spends its time here, and say the one change that would help most.

    Start it as the run will be started, under torchrun or accelerate launch for several processes. Nothing is written.
    """
    with quick_imports():
        from sslkit.profiling import changes_that_help, profile

    loaded = recipe_from_words(recipe, overrides or [], method, backbone, data)
    measured = profile(loaded, seconds)
    changes = changes_that_help(measured, loaded)
    if measured.process:
        return
    if as_json:
        fields = {**dataclasses.asdict(measured), "images_per_second": measured.images_per_second}
        show_json({**fields, "changes": [dataclasses.asdict(each) for each in changes]})
        return
    _show(measured, changes)


def _show(measured: "Profile", changes: "list[Change]") -> None:
    from sslkit.profiling.speed_advice import share_of_passes

    show(
        f"{measured.images_per_second:.4g} images/s: a step of {measured.batch} images on each of "
        f"{counted(measured.processes, 'process', 'processes')} takes {_ms(measured.step)} ({measured.device}, "
        f"{counted(measured.steps, 'step')})"
    )
    table = PlainTable("where it goes", "ms", "share", "")
    for name, spent in [("waiting for data", measured.waiting), *measured.stages.items()]:
        share = spent / measured.step
        table.add_row(name, f"{1e3 * spent:.1f}", f"{share:.1%}", "█" * round(BAR * min(share, 1.0)))
    console.print(table)
    images = measured.images
    left_out = f", {images.unreadable} more cannot be read" if images.unreadable else ""
    show(
        f"an image costs one core {_ms(images.seconds)}: reading {_ms(images.read)}, decoding {_ms(images.decode)}, "
        f"views {_ms(images.views)} (mean of {images.images}{left_out}); {counted(measured.workers, 'data worker')} "
        f"a process and {counted(measured.cores, 'core')}"
    )
    if measured.peak_bytes is not None:
        show(f"most memory of the device in use: {measured.peak_bytes / 2**30:.2f} GiB")
    for number, change in enumerate(changes):
        opening = "what would help most" if number == 0 else "also"
        show(f"{opening}: {change.what} ({change.gain:.2f} x as fast)")
    if not changes:
        show(f"nothing stands out: the backbones' own passes are {share_of_passes(measured):.0%} of a step")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
