"""``sslkit data check`` finds what is wrong with images before a run does; ``sslkit prepare`` packs them for one."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from sslkit.cli.options import ImageColumn, LabelColumn, data_config, find_background
from sslkit.cli.output import AsJson, console
from sslkit.errors import UserError, check_path
from sslkit.terminal import PlainTable, show, show_json

FINDINGS = 2  # exit code of --strict
SHOWN = 10  # of a list, on the screen

data_app = typer.Typer(help="Look at images before training on them.", no_args_is_help=True)


@data_app.callback()
def _group() -> None:
    """Look at images before training on them."""


@data_app.command(epilog="Example: sslkit data check photos --strict")
def check(
    path: Annotated[str, typer.Argument(help="Folder of images or datasets id.", metavar="DIR|ID")],
    split: Annotated[str, typer.Option(help="Split to read; all: everything, whatever folders are called.")] = "train",
    name: Annotated[str, typer.Option(help="Configuration of the dataset.")] = "",
    image_column: ImageColumn = "",
    label_column: LabelColumn = "",
    channels: Annotated[
        int, typer.Option(help="Channels of images that are not RGB, as [backbone] in_chans has it.", min=1, max=512)
    ] = 3,
    background: Annotated[
        str, typer.Option(help="Colour that transparent pixels are composited over, or keep, which drops alpha.")
    ] = "white",
    workers: Annotated[int, typer.Option(help="Processes that read; -1: one a core.", min=-1)] = -1,
    strict: Annotated[bool, typer.Option(help="Exit with 2 if an image is unreadable or occurs twice.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every image as training would, and report what they are and which of them are bad.

    Formats, modes and sizes; unreadable, tiny, huge and long images; exact and near duplicates; the channels' mean and
    standard deviation for a recipe; the share of grey images, which colour jitter does nothing for; class counts.
    """
    from sslkit.data.loading.loader import cores_of_a_process
    from sslkit.data.sources.image_source import open_source, skipped_files
    from sslkit.data.tools.inspection import inspect_images

    config = data_config(path, name, label_column, image_column, find_background(background)).model_copy(
        update={"split": split, "channels": None if channels == 3 else channels}
    )
    source = open_source(config)
    with _progress(len(source)) as advance:
        found = inspect_images(source, cores_of_a_process(1) if workers < 0 else workers, advance)
    found["left_out"] = dict(skipped_files(config).most_common())
    if as_json:
        show_json(found)
    else:
        _show(found)
    if strict and (found["unreadable"]["count"] or found.get("exact_duplicates", {}).get("groups")):
        raise typer.Exit(FINDINGS)


def prepare(
    path: Annotated[str, typer.Argument(help="Folder of images or datasets id.", metavar="DIR|ID")],
    output: Annotated[str, typer.Argument(help="Folder to write; a folder of shards in it for each split.")],
    split: Annotated[list[str] | None, typer.Option(help="Split to pack; may repeat. Default: all there are.")] = None,
    name: Annotated[str, typer.Option(help="Configuration of the dataset.")] = "",
    image_column: ImageColumn = "",
    label_column: LabelColumn = "",
    side: Annotated[
        int,
        typer.Option(
            min=16, max=8192, help="Shorter side to shrink larger images to. 504: no crop of MoCo v2 loses a pixel."
        ),
    ] = 504,
    quality: Annotated[int, typer.Option(min=50, max=100, help="JPEG quality of images that are shrunk.")] = 95,
    workers: Annotated[int, typer.Option(help="Processes that decode; -1: one a core.", min=-1)] = -1,
    seed: Annotated[int, typer.Option(min=0, help="Of the order.")] = 0,
    shard_images: Annotated[int, typer.Option(min=64, help="Images of a shard.")] = 2048,
    background: Annotated[
        str,
        typer.Option(help="Colour that transparent pixels of shrunk images are composited over, or keep."),
    ] = "white",
) -> None:
    """Pack images into a few large files, large ones made smaller, for where disk or decoding holds training up.

    Then [data] path = "OUTPUT". Smaller images are kept byte for byte, labels and order of reading too; unreadable ones
    are left out and listed. The same command continues one that was interrupted.
    """
    from sslkit.data.loading.loader import cores_of_a_process
    from sslkit.data.sources.image_source import available_splits, open_source
    from sslkit.data.tools.inspection import describe_alpha
    from sslkit.data.tools.packing import Packing, pack

    check_path(path, "DATA")
    check_path(output, "OUTPUT")
    if Path(path).is_dir() and Path(output).resolve().is_relative_to(Path(path).resolve()):
        raise UserError(f"{output}: lies in the folder that is packed; give one elsewhere")
    config = data_config(path, name, label_column, image_column, find_background(background))
    packing = Packing(side, quality, seed, shard_images, config.background)
    for each in split or available_splits(config) or ["train"]:
        source = open_source(config.model_copy(update={"split": each}))
        folder = Path(output) / each
        _say(describe_alpha(source))
        with _progress(len(source)) as advance:
            packed = pack(source, folder, packing, cores_of_a_process(1) if workers < 0 else workers, advance)
        _say(
            f"{folder}: {packed.images} images, {packed.shrunk} of them shrunk, "
            f"{_size(packed.bytes_before)} -> {_size(packed.bytes_after)}"
        )
        if packed.left_out:
            first = packed.left_out[0]
            _say(f"{len(packed.left_out)} left out, listed in {folder / 'prepared.json'}: {first['name']}", "yellow")


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _progress(total: int) -> AbstractContextManager[Any]:
    """A bar on the terminal's error stream, or nothing elsewhere."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        return nullcontext(lambda count: None)
    return _Bar(errors, total)


class _Bar(Progress):
    def __init__(self, errors: Console, total: int) -> None:
        super().__init__(console=errors, transient=True)
        self.images = self.add_task("images", total=total)

    def __enter__(self) -> Any:
        super().__enter__()
        return lambda count: self.advance(self.images, count)


def _show(found: dict[str, Any]) -> None:
    _say(f"{found['data']}: {found['images']} images, {found['readable']} of them readable")
    if left_out := found["left_out"]:
        _say(f"files not taken for images: {_counts(left_out)}")
    if found["readable"]:
        _show_readable(found)
    if found["label_problem"]:
        _say(f"labels cannot be used for evaluation: {found['label_problem']}", "yellow")
    if found["classes"]:
        least, most = min(found["classes"].values()), max(found["classes"].values())
        _say(f"{len(found['classes'])} classes of {least} to {most} images")
    _show_list("unreadable", found, lambda image: f"{image['name']}: {image['reason']}")
    for kind, meaning in (("tiny", "shorter side below 32"), ("huge", "over 16 million pixels"), ("long", "over 8:1")):
        _show_list(kind, found, lambda image: f"{image['name']}: {image['width']} x {image['height']}", meaning)
    for kind in ("exact_duplicates", "near_duplicates"):
        _show_groups(kind, found)


def _show_readable(found: dict[str, Any]) -> None:
    from sslkit.data.decode.background import describe_background

    _say(f"formats: {_counts(found['formats'])}; modes: {_counts(found['modes'])}")
    _say(f"turned by EXIF: {found['exif_rotated']}; grey: {found['grey_share']:.1%}")
    if alpha := found.get("alpha"):
        done = f": {describe_background(alpha['background'])}" if alpha["count"] else ""
        _say(f"alpha channel: {alpha['count']}, {alpha['transparent']} of them with transparent pixels{done}")
    _say(f"[views] mean = {found['mean']}, std = {found['std']}")
    table = PlainTable("quantile", *found["quantiles"])
    for share in found["quantiles"]["width"]:
        table.add_row(f"{float(share):.0%}", *(str(values[share]) for values in found["quantiles"].values()))
    console.print(table)
    if found["grey_share"] == 1.0:
        _say("every image is grey: jitter of saturation and hue, and turning grey, change nothing")


def _show_list(kind: str, found: dict[str, Any], line: Any, meaning: str = "") -> None:
    listed = found.get(kind)
    if not listed or not listed["count"]:
        return
    _say(f"{kind}{f' ({meaning})' if meaning else ''}: {listed['count']}", "yellow" if meaning else "bold red")
    for image in listed["images"][:SHOWN]:
        _say(f"  {line(image)}")
    _say_rest(listed["count"])


def _show_groups(kind: str, found: dict[str, Any]) -> None:
    listed = found.get(kind)
    if not listed or not listed["groups"]:
        return
    _say(f"{kind.replace('_', ' ')}: {listed['surplus']} images too many, in {listed['groups']} groups", "yellow")
    for group in listed["images"][:SHOWN]:
        _say(f"  {' = '.join(group[:3])}{f' and {len(group) - 3} more' if len(group) > 3 else ''}")
    _say_rest(listed["groups"])


def _say_rest(count: int) -> None:
    if count > SHOWN:
        _say(f"  and {count - SHOWN} more; --json lists up to 1000")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{word} {count}" for word, count in counts.items())


def _say(line: str, style: str = "") -> None:
    show(line, style)
