"""``sslkit adapt``: continue public weights on own images, and say whether it helped."""

import contextlib
import dataclasses
import sys
from typing import Annotated

import typer

from sslkit.cli.launcher_exit import leave_for_launcher
from sslkit.cli.options import DataName, Model, Overrides, data_config, fast_imports
from sslkit.errors import UserError
from sslkit.exit_codes import RESUMABLE
from sslkit.terminal import print_json, print_line, print_plain


@dataclasses.dataclass(frozen=True)
class AdaptImages:
    """The images that are trained on, and labelled ones for the verdict."""

    data: Annotated[
        str, typer.Option("--data", help="Images: folder, datasets id, or builtin:NAME. No labels are read.")
    ]
    labelled: Annotated[
        str, "Labelled images for the verdict, such as a folder with one folder per class; may be those of --data."
    ] = ""
    retain: Annotated[str, "Other labelled images, whose loss would be forgetting."] = ""
    data_name: DataName = ""
    split: Annotated[str, "Split of --data."] = "train"


@dataclasses.dataclass(frozen=True)
class AdaptSettings:
    """How much, and how."""

    way: Annotated[str, "What trains: all layers, the last blocks, or lora (low-rank updates; needs peft)."] = "all"
    size: Annotated[int, typer.Option(min=0, help="Side of the input in pixels; 0: chosen.")] = 0
    epochs: Annotated[int, typer.Option(min=0, help="Passes over the images; 0: as many as fit in --hours.")] = 0
    hours: Annotated[float, typer.Option(min=0.01, help="Time for training and judging.")] = 1.0


def adapt(
    weights: Model,
    images: AdaptImages,
    settings: AdaptSettings,
    output: Annotated[str, "Folder for encoder/, answer.json and run/."] = "runs/adapt",
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON; progress goes to stderr.")] = False,
) -> None:
    """Continue WEIGHTS on your images, and say whether it helped.

    Start and end are judged on the same labelled images. The better encoder is written to OUTPUT/encoder: the start
    itself if nothing was gained. The same command continues an interrupted run.
    """
    with fast_imports():
        from sslkit.adapt import AdaptOptions, adapt_weights
        from sslkit.adapt.adapt_recipe import Wishes

    if settings.epochs and settings.hours != AdaptSettings.hours:
        raise UserError("--epochs and --hours: give one of them")
    labelled, retain = (
        data_config(each, "", "", "", "") if each else None for each in (images.labelled, images.retain)
    )
    options = AdaptOptions(
        labelled=labelled,
        retain=retain,
        wishes=Wishes(settings.way, settings.size, settings.epochs, tuple(overrides or ())),
        hours=settings.hours,
        log_message=lambda message: print_plain(message, to_stderr=as_json),
    )
    data = data_config(images.data, images.data_name, "", "", "").model_copy(update={"split": images.split})
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = adapt_weights(weights, data, output, options)
    if result.answer is None:
        leave_for_launcher("sslkit: stopped on request, checkpoint saved; the same command continues the adaptation")
        raise typer.Exit(RESUMABLE)
    if as_json:
        print_json(result.answer.as_dict())
        return
    for line in result.answer.lines():
        print_line(line)
    print_line(f"encoder: {result.folder / 'encoder'}, run: {result.folder / 'run'}")
