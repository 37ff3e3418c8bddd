"""``sslkit data check`` finds bad images before training; ``sslkit prepare`` packs images for faster reading."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslkit.cli.options import DataName, ImageColumn, LabelColumn, command, data_config
from sslkit.cli.output import AsJson, console
from sslkit.errors import UserError, check_path
from sslkit.exit_codes import BAD_INPUT
from sslkit.progress import stage
from sslkit.terminal import PlainTable, print_json, print_line
from sslkit.text import pluralize

if TYPE_CHECKING:
    from sslkit.data.sources.image_source import DataConfig

MAX_PRINTED = 10  # entries of a list

data_app = typer.Typer(
    help="Inspect images before training on them.", no_args_is_help=True, epilog="Example: sslkit data check photos"
)

Workers = Annotated[int, typer.Option(help="Processes that read images; -1: one per core.", min=-1)]


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Where the images are and how they are read."""

    path: Annotated[str, typer.Argument(help="Folder of images, datasets id, or builtin:NAME.", metavar="DIR|ID")]
    name: DataName = ""
    image_column: ImageColumn = ""
    label_column: LabelColumn = ""
    background: Annotated[str, "Colour behind transparent pixels, or keep, which ignores alpha."] = "white"

    def config(self) -> "DataConfig":
        """The same for `sslkit.data`."""
        return data_config(self.path, self.name, self.label_column, self.image_column, self.background)


@command(data_app, "sslkit data check photos --strict")
def check(
    data: DataOptions,
    split: Annotated[str, "Split to read; all: all images, whatever the names of the folders."] = "train",
    channels: Annotated[int, typer.Option(min=1, max=512, help="Channels of the images, as backbone.in_chans.")] = 3,
    workers: Workers = -1,
    strict: Annotated[bool, "Exit with code 2 if an image is unreadable or a duplicate."] = False,
    as_json: AsJson = False,
) -> None:
    """Read every image as training does, and report statistics and bad images.

    Formats, modes and sizes; unreadable, tiny, huge and elongated images; exact and near duplicates; mean and standard
    deviation of the channels for a recipe; the share of grey images, which colour jitter does not change; class sizes.
    """
    from sslkit.data.loading.loader import cores_of_a_process
    from sslkit.data.sources.image_source import open_source, skipped_files
    from sslkit.data.tools.inspection import inspect_images

    config = data.config().model_copy(update={"split": split, "channels": None if channels == 3 else channels})
    source = open_source(config)
    with stage("check", len(source), "image") as advance:
        found = inspect_images(source, cores_of_a_process(1) if workers < 0 else workers, advance)
    found["left_out"] = dict(skipped_files(config).most_common())
    if as_json:
        print_json(found)
    else:
        _print_findings(found)
    if strict and (found["unreadable"]["count"] or found.get("exact_duplicates", {}).get("groups")):
        raise typer.Exit(BAD_INPUT)


def prepare(
    data: DataOptions,
    output: Annotated[str, typer.Argument(help="Folder to write, with one folder of shards per split.")],
    split: Annotated[list[str] | None, "Split to pack; repeatable. Default: all."] = None,
    side: Annotated[
        int, typer.Option(min=16, max=8192, help="Shorter side of shrunk images. 504 keeps all of MoCo v2's crops.")
    ] = 504,
    quality: Annotated[int, typer.Option(min=50, max=100, help="JPEG quality of shrunk images.")] = 95,
    workers: Workers = -1,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the order.")] = 0,
    shard_images: Annotated[int, typer.Option(min=64, help="Images per shard.")] = 2048,
) -> None:
    """Pack images into a few large files and shrink large images, if reading or decoding limits training speed.

    Train with --data OUTPUT. Labels are kept, and images that are not shrunk stay byte for byte the same.
    Unreadable images are left out and listed. The same command continues after an interruption.
    """
    from sslkit.data.loading.loader import cores_of_a_process
    from sslkit.data.sources.image_source import available_splits, open_source
    from sslkit.data.tools.inspection import describe_alpha
    from sslkit.data.tools.packing import Packing, pack

    check_path(data.path, "DATA")
    check_path(output, "OUTPUT")
    if Path(data.path).is_dir() and Path(output).resolve().is_relative_to(Path(data.path).resolve()):
        raise UserError(f"OUTPUT {output}: is inside the folder to pack, {data.path}; give a folder outside it")
    config = data.config()
    packing = Packing(side, quality, seed, shard_images, config.background)
    for each in split or available_splits(config) or ["train"]:
        source = open_source(config.model_copy(update={"split": each}))
        folder = Path(output) / each
        print_line(describe_alpha(source))
        with stage(f"pack {each}", len(source), "image") as advance:
            packed = pack(source, folder, packing, cores_of_a_process(1) if workers < 0 else workers, advance)
        print_line(
            f"{folder}: {pluralize(packed.images, 'image')}, {packed.shrunk} of them shrunk, "
            f"{_size(packed.bytes_before)} -> {_size(packed.bytes_after)}"
        )
        if packed.left_out:
            first = packed.left_out[0]
            count = pluralize(len(packed.left_out), "unreadable image")
            print_line(f"{count} left out, listed in {folder / 'prepared.json'}; first: {first['name']}", "yellow")


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _print_findings(found: dict[str, Any]) -> None:
    print_line(f"{found['data']}: {pluralize(found['images'], 'image')}, {found['readable']} readable")
    if left_out := found["left_out"]:
        print_line(f"other files: {_counts(left_out)}")
    if found["readable"]:
        _print_statistics(found)
    if found["label_problem"]:
        print_line(f"labels cannot be used for evaluation: {found['label_problem']}", "yellow")
    if found["classes"]:
        least, most = min(found["classes"].values()), max(found["classes"].values())
        print_line(f"{pluralize(len(found['classes']), 'class', 'classes')} of {least} to {most} images")
    if bad := found["unreadable"]["count"]:
        lines = [f"{image['name']}: {image['reason']}" for image in found["unreadable"]["images"]]
        _print_list(f"unreadable: {bad}", bad, lines, "bold red")
    for kind, meaning in (("tiny", "shorter side below 32"), ("huge", "over 16 million pixels"), ("long", "over 8:1")):
        if (listed := found.get(kind)) and listed["count"]:
            lines = [f"{image['name']}: {image['width']} x {image['height']}" for image in listed["images"]]
            _print_list(f"{kind} ({meaning}): {listed['count']}", listed["count"], lines)
    for kind in ("exact_duplicates", "near_duplicates"):
        if (listed := found.get(kind)) and listed["groups"]:
            surplus, groups = pluralize(listed["surplus"], "redundant image"), pluralize(listed["groups"], "group")
            lines = [
                f"{' = '.join(group[:3])}{f' and {len(group) - 3} more' if len(group) > 3 else ''}"
                for group in listed["images"]
            ]
            _print_list(f"{kind.replace('_', ' ')}: {surplus} in {groups}", listed["groups"], lines)


def _print_statistics(found: dict[str, Any]) -> None:
    from sslkit.data.decode.background import describe_background

    print_line(f"formats: {_counts(found['formats'])}; modes: {_counts(found['modes'])}")
    print_line(f"rotated by EXIF: {found['exif_rotated']}; grey: {found['grey_share']:.1%}")
    if alpha := found.get("alpha"):
        done = f": {describe_background(alpha['background'])}" if alpha["count"] else ""
        print_line(f"alpha channel: {alpha['count']}, {alpha['transparent']} of them with transparent pixels{done}")
    print_line(f"[views] mean = {found['mean']}, std = {found['std']}")
    table = PlainTable("quantile", *found["quantiles"])
    for share in found["quantiles"]["width"]:
        table.add_row(f"{float(share):.0%}", *(str(values[share]) for values in found["quantiles"].values()))
    console.print(table)
    if found["grey_share"] == 1.0:
        print_line("all images are grey: saturation, hue and gray_prob of [views] have no effect")


def _print_list(heading: str, count: int, lines: list[str], style: str = "yellow") -> None:
    print_line(heading, style)
    for line in lines[:MAX_PRINTED]:
        print_line(f"  {line}")
    if count > MAX_PRINTED:
        print_line(f"  and {count - MAX_PRINTED} more; --json lists up to 1000")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
