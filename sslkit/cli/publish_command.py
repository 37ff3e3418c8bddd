"""``sslkit publish``: a run's encoder as a repository of the Hub."""

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from sslkit.cli.output import AsJson
from sslkit.cli.startup import quick_imports
from sslkit.errors import UserError
from sslkit.terminal import show, show_json


def publish(
    run: Annotated[str, typer.Argument(help="Run folder.")],
    repo_id: Annotated[str, typer.Option("--repo-id", help="user/name on the Hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Only its owner may see it.")] = False,
    revision: Annotated[str, typer.Option(help="Branch; made if it is not there.")] = "main",
    license_id: Annotated[str, typer.Option("--license", help="SPDX id of the weights' licence.")] = "apache-2.0",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Make the folder RUN/publish and ask nobody.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish the newest encoder on the Hugging Face Hub, with a card of its training and scores, as one commit.

    The files lie ready in RUN/publish first. Whatever breaks, the same command goes on; publishing again adds a commit.
    """
    with quick_imports():
        from sslkit.publish import publish_run
        from sslkit.report import draw_curves

    with suppress(UserError):  # a run that has logged nothing is published without a picture
        draw_curves(Path(run))
    published = publish_run(run, repo_id, private=private, revision=revision, license_id=license_id, dry_run=dry_run)
    if as_json:
        show_json(dataclasses.asdict(published))
        return
    for name, size in published.files.items():
        show(f"{size:>12,} {name}")
    if dry_run:
        show(f"{published.folder} is ready; nothing was sent")
        return
    news = "" if published.is_new else ", as before: nothing had changed"
    show(f"{published.url}: commit {published.commit}{news}")
    if published.replaced_card:
        words = f"its README.md, written by hand, was replaced; commit {published.replaced_card} still has it"
        show(words)
    name = repo_id if revision == "main" else f"{repo_id}@{revision}"
    how = (
        f'timm.create_model("hf_hub:{name}", pretrained=True, num_classes=0)'
        if published.loads_in_timm
        else f'sslkit.evaluate.load_encoder("hf_hub:{name}")'
    )
    show(f"load it with {how}")
