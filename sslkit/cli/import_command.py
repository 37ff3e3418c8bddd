"""``sslkit import``: others' checkpoints as timm folders."""

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from sslkit.cli.output import AsJson, console
from sslkit.cli.startup import quick_imports
from sslkit.terminal import PlainTable, show, show_json

if TYPE_CHECKING:
    from sslkit.publish import Imported


def import_(
    file: Annotated[str, typer.Argument(help="Checkpoint: .pth, .pth.tar, .ckpt or .safetensors.")],
    folder: Annotated[str, typer.Argument(help="New or empty folder to write.")],
    backbone: Annotated[str, typer.Option(help="timm name, where the tensors' shapes do not tell.")] = "",
    num_heads: Annotated[int, typer.Option(min=0, help="Of a ViT whose layout does not tell.")] = 0,
    license_id: Annotated[str, typer.Option("--license", help="SPDX id of the weights' licence.")] = "unknown",
    as_json: AsJson = False,
) -> None:
    """Write the encoder of an official MoCo or SwAV checkpoint, or another library's, as a folder that timm loads.

    lightly, solo-learn, VISSL and mmselfsup are known. FOLDER/import.json says what became of every tensor.
    """
    with quick_imports():
        from sslkit.publish import import_checkpoint

    imported = import_checkpoint(file, folder, backbone, num_heads, license_id)
    if as_json:
        show_json(imported.to_json())
        return
    _show(imported, folder)


def _show(imported: "Imported", folder: str) -> None:
    arguments = "".join(f", {name} {value}" for name, value in imported.model_args.items())
    show(f"{imported.checkpoint_format}: {imported.backbone}{arguments}")
    if imported.released:
        show(f"its MD5 begins as that of the authors' {imported.released}")
    table = PlainTable("tensors", "fate", "such as")
    fates = Counter(fate.why for fate in imported.tensors)
    for why, count in sorted(fates.items(), key=lambda item: (item[0] != "", item[0])):
        example = next(fate for fate in imported.tensors if fate.why == why)
        arrow = f" -> {example.kept_as}" if example.kept_as else ""
        table.add_row(str(count), f"left out: {why}" if why else "kept", f"{example.name}{arrow}")
    console.print(table)
    show(f"{folder}: features equal bit for bit after reloading; import.json has every tensor")
    show(f'load it with timm.create_model("local-dir:{folder}", pretrained=True, num_classes=0)')
