"""Check a run folder before it is written to, and find the checkpoint to resume from."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from sslkit.data.decode.background import KEEP
from sslkit.data.formats.folder_listing import printable, to_text
from sslkit.data.sources.image_source import ImageSource
from sslkit.engine.checkpoint.format import Checkpoint, newest_checkpoint, read_checkpoint
from sslkit.engine.run_folder.dataset_identity import DATA, IMAGES, recorded_names_digest, restore_images
from sslkit.engine.run_folder.lock import PROBE, refuse_unwritable
from sslkit.errors import UserError, check_path
from sslkit.files.atomic import refuse_links
from sslkit.files.run_reader import LOCK
from sslkit.recipe.resolve import Recipe, as_saved, build_recipe, changes, read_tables
from sslkit.recipe.schema import check_plain

# Files that a start writes before the recipe, and their temporary names. An earlier version used .recipe.tmp.
FIRST_FILES = (
    *(LOCK, PROBE, ".recipe.tmp"),
    *(DATA, IMAGES),
    *(f".{name}.tmp" for name in (DATA, IMAGES, "recipe.toml")),
)
MAX_LISTED = 20  # changed keys that a message lists
# Keys that do not change what is learned; a run may be resumed with other values.
FREE_KEYS = (
    *("data.workers", "data.worker_timeout", "data.max_bad_share"),
    *("train.max_steps", "train.processes", "train.shard", "train.log_every"),
    *("train.max_hours", "monitor.diagnose_every", "checkpoint.", "guard.", "track.", "reference."),
)
# Keys that a run started from another run's checkpoint must share with it.
SAME_KEYS = ("method.", "backbone.", "adapt.", "optim.name", "optim.exclude")


def check_folder(folder: Path, recipe: Recipe, resume: str) -> None:
    """Refuse a folder that cannot be used for this recipe, before anything is written.

    A UserError is raised if it cannot be written to, is not a run, or holds a run of another recipe. It is a run once
    it has ``recipe.toml``; with only the files that a start writes before that, it counts as empty.
    """
    check_path(folder, "--output")
    check_path(resume, "--resume")
    with refuse_unwritable(folder):
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        filled = folder.exists() and any(folder.iterdir())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--output {folder}: {existing} is not a folder that can be written to")
    if not filled:
        return
    refuse_links(folder)
    saved, others = folder / "recipe.toml", _foreign_entries(folder)
    if not saved.is_file():  # checked last, because another start may be writing it
        if others:
            raise UserError(
                f"--output {folder}: holds something that is not a run, such as {printable(to_text(others[0]))}; "
                "choose a new or empty folder"
            )
        return
    if resume == "never":
        raise UserError(f"--output {folder}: already holds a run; --resume never needs a new or empty folder")
    try:
        before = read_tables(saved)
    except UserError as error:
        raise UserError(f"{error}; a run cannot be resumed without a readable recipe.toml") from error
    if changed := _changed(before, recipe):
        raise UserError(
            f"--output {folder}: holds a run of another recipe; choose another folder (--resume {folder} starts there "
            f"from its newest checkpoint), resume with its own recipe ({folder / 'recipe.toml'}), or undo: "
            f"{_list_changes(changed)}"
        )


def _foreign_entries(folder: Path) -> list[str]:
    """The entries of a folder without a recipe that no start, even one that was killed, has written."""
    checkpoints = folder / "checkpoints"
    others = [entry for entry in folder.iterdir() if not (entry.is_file() and entry.name in FIRST_FILES)]
    if checkpoints in others and checkpoints.is_dir():
        others.remove(checkpoints)
        others += [entry for entry in checkpoints.iterdir() if not (entry.is_file() and entry.name == PROBE)]
    return sorted(str(entry.relative_to(folder)) for entry in others if entry.exists())


def _changed(before: dict[str, Any], recipe: Recipe) -> list[str]:
    """The keys in which a recipe differs from the saved one, except `FREE_KEYS`."""
    return [line for line in changes(with_defaults(before), recipe.as_tables()) if not line.startswith(FREE_KEYS)]


def keep_background(folder: Path, recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Set ``[data] background`` to "keep" for a run older than the key, unless the recipe states it; with messages."""
    saved = folder / "recipe.toml"
    if "background" in recipe.data.model_fields_set or not saved.is_file():
        return recipe, []
    try:
        before = read_tables(saved).get("data")
    except UserError:  # `check_folder` reports it
        return recipe, []
    # The key is in the saved recipe if the run was resumed before.
    if not isinstance(before, dict) or before.get("background", KEEP) != KEEP:
        return recipe, []
    recipe = replace(recipe, data=recipe.data.model_copy(update={"background": KEEP}))
    return recipe, [
        f'{folder}: this run started with [data] background = "keep", the only behaviour before the key existed, and '
        "keeps it; another background needs a new folder"
    ]


def _list_changes(lines: list[str]) -> str:
    more = f"; and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
    return "; ".join(line[:200] for line in lines[:MAX_LISTED]) + more


def with_defaults(tables: dict[str, Any]) -> dict[str, Any]:
    """The tables of a saved recipe with defaults for newer keys; unchanged if the recipe is no longer valid."""
    try:
        return build_recipe(as_saved(tables)).as_tables()
    except UserError:
        return tables


def inspect_folder(
    folder: Path, recipe: Recipe, resume: str, source: ImageSource
) -> tuple[ImageSource, Checkpoint | None, list[str]]:
    """Check a locked run folder; returns the images of its run, the checkpoint to resume from, and messages to log."""
    check_folder(folder, recipe, resume)
    source, messages = restore_images(folder, source, recipe.data.max_bad_share)
    checkpoint, problems = find_checkpoint(folder, recipe, resume)
    return source, checkpoint, [*messages, *problems]


def find_checkpoint(folder: Path, recipe: Recipe, resume: str) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, if any, and a message for each damaged one that was skipped."""
    if resume in ("auto", "never"):
        newest, broken = newest_checkpoint(folder / "checkpoints")
        if newest is not None:
            check_saved_by_run(newest, folder, recipe)
        return newest, broken
    path = Path(resume)
    of_run = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    is_one = (path / "manifest.json").is_file()
    checkpoint, problems = (read_checkpoint(path), list[str]()) if is_one else newest_checkpoint(of_run)
    if checkpoint is None:
        raise UserError(f"--resume {resume}: has no checkpoint; give a run or checkpoint folder, auto or never")
    check_plain(checkpoint.state["recipe"], f"--resume {resume}: its recipe:")
    differing = changes(with_defaults(checkpoint.state["recipe"]), recipe.as_tables())
    unfit = [line for line in differing if line.startswith(SAME_KEYS)]
    if unfit:
        raise UserError(
            f"--resume {resume}: was trained by another recipe; these keys must be the same: {_list_changes(unfit)}"
        )
    return checkpoint, problems


def check_saved_by_run(checkpoint: Checkpoint, folder: Path, recipe: Recipe) -> None:
    """Raise a UserError if a checkpoint in a run folder was copied from another run; names the keys that differ."""
    check_plain(checkpoint.state["recipe"], f"{checkpoint.folder}: its recipe:")
    remedy = "move it away to resume from an earlier checkpoint, or train from it in another folder with --resume"
    if changed := _changed(checkpoint.state["recipe"], recipe):
        raise UserError(
            f"{checkpoint.folder}: was saved by a run of another recipe: {_list_changes(changed)}; {remedy}"
        )
    images = checkpoint.state.get("images")
    if images and (ours := recorded_names_digest(folder)) and images != ours:
        raise UserError(f"{checkpoint.folder}: was saved by a run on other images; {remedy}")
