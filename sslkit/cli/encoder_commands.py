"""``sslkit export``, ``publish`` and ``import``: encoders as folders, on the Hub, and from other libraries."""

import dataclasses
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from sslkit.cli.options import fast_imports
from sslkit.cli.output import AsJson, console
from sslkit.errors import UserError
from sslkit.terminal import PlainTable, print_json, print_line

Run = Annotated[str, typer.Argument(help="Run folder.")]
NewFolder = Annotated[str, typer.Argument(help="Folder to write; must be new or empty.")]
License = Annotated[str, typer.Option("--license", help="SPDX identifier of the licence of the weights.")]


def export(
    run: Run,
    folder: NewFolder,
    license_id: License = "apache-2.0",
    layout: Annotated[str, typer.Option("--format", help="timm, or detectron2 (ResNets only).")] = "timm",
) -> None:
    """Write the encoder of a run as a folder that timm and transformers can load, and verify it by loading it."""
    with fast_imports():
        from sslkit.publish import export_detectron2, export_encoder

    if layout not in ("timm", "detectron2"):
        raise UserError(f"--format: must be timm or detectron2, not {layout!r}")
    if layout == "detectron2":
        written = export_detectron2(run, folder)
        print_line(f"{written['file']}: {written['convolutions']} convolutions with their norms")
        print_line(f"{folder}/README.md: the matching detectron2 configuration")
        return
    proof = export_encoder(run, folder, license_id)
    print_line(f"{folder}: features {proof['features']} equal bit for bit after reloading")
    _print_how_to_load(f"local-dir:{folder}" if proof["loads_in_timm"] else folder, proof["loads_in_timm"])


def _print_how_to_load(name: str, in_timm: bool) -> None:
    if in_timm:
        print_line(f'load it with timm.create_model("{name}", pretrained=True, num_classes=0)')
    else:
        print_line(f'timm cannot build its stem for small images: load it with sslkit.evaluate.load_encoder("{name}")')


def publish(
    run: Run,
    repo_id: Annotated[str, typer.Option("--repo-id", help="user/name on the Hub; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    revision: Annotated[str, "Branch; created if it does not exist."] = "main",
    license_id: License = "apache-2.0",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the folder RUN/publish; send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish the newest encoder of a run on the Hugging Face Hub, with a model card, as one commit.

    The files are written to RUN/publish first. After an error, run the same command again. Publishing again adds a
    commit.
    """
    with fast_imports():
        from sslkit.publish import publish_run
        from sslkit.report import draw_curves

    with suppress(UserError):  # a run without metrics is published without curves
        draw_curves(Path(run))
    published = publish_run(run, repo_id, private=private, revision=revision, license_id=license_id, dry_run=dry_run)
    if as_json:
        print_json(dataclasses.asdict(published))
        return
    for name, size in published.files.items():
        print_line(f"{size:>12,} {name}")
    if dry_run:
        print_line(f"{published.folder} is ready; nothing was sent")
        return
    unchanged = "" if published.is_new else " (unchanged)"
    print_line(f"{published.url}: commit {published.commit}{unchanged}")
    if published.replaced_card:
        print_line(f"replaced a README.md that was written by hand; it is still in commit {published.replaced_card}")
    name = repo_id if revision == "main" else f"{repo_id}@{revision}"
    _print_how_to_load(f"hf_hub:{name}", published.loads_in_timm)


def import_(
    file: Annotated[str, typer.Argument(help="Checkpoint: .pth, .pth.tar, .ckpt or .safetensors.")],
    folder: NewFolder,
    backbone: Annotated[str, "timm name, if the shapes of the tensors do not determine it."] = "",
    num_heads: Annotated[int, typer.Option(min=0, help="Attention heads of a ViT, if not in the checkpoint.")] = 0,
    license_id: License = "unknown",
    as_json: AsJson = False,
) -> None:
    """Write the encoder of an official MoCo or SwAV checkpoint, or of another library's, as a folder that timm loads.

    Reads checkpoints of lightly, solo-learn, VISSL and mmselfsup. FOLDER/import.json lists every tensor and whether it
    was kept.
    """
    with fast_imports():
        from sslkit.publish import import_checkpoint

    imported = import_checkpoint(file, folder, backbone, num_heads, license_id)
    if as_json:
        print_json(imported.to_json())
        return
    arguments = "".join(f", {name} {value}" for name, value in imported.model_args.items())
    print_line(f"{imported.checkpoint_format}: {imported.backbone}{arguments}")
    if imported.released:
        print_line(f"its MD5 starts like that of the authors' {imported.released}")
    table = PlainTable("tensors", "kept?", "example")
    counts = Counter(tensor.why for tensor in imported.tensors)
    for why, count in sorted(counts.items(), key=lambda item: (item[0] != "", item[0])):
        example = next(tensor for tensor in imported.tensors if tensor.why == why)
        arrow = f" -> {example.kept_as}" if example.kept_as else ""
        table.add_row(str(count), f"left out: {why}" if why else "kept", f"{example.name}{arrow}")
    console.print(table)
    print_line(f"{folder}: features equal bit for bit after reloading; import.json lists every tensor")
    _print_how_to_load(f"local-dir:{folder}", in_timm=True)
