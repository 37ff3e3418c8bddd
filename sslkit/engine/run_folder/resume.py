"""Check a run folder before it is written to, and find the checkpoint to resume from."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from sslkit.command_line import free_folder, same_command
from sslkit.data.decode.background import KEEP
from sslkit.data.formats.folder_listing import printable, to_text
from sslkit.data.sources.image_source import ImageSource
from sslkit.engine.checkpoint.format import Checkpoint, newest_checkpoint, read_checkpoint
from sslkit.engine.checkpoint.retention import NAME, saved_steps
from sslkit.engine.run_folder.dataset_identity import DATA, IMAGES, recorded_names_digest, restore_images
from sslkit.engine.run_folder.lock import PROBE, refuse_unwritable
from sslkit.engine.runtime.precision import chosen_precision
from sslkit.errors import UserError, check_path
from sslkit.files.atomic import refuse_links
from sslkit.files.run_reader import LOCK
from sslkit.methods import canonical_name, find_method
from sslkit.recipe.overrides import Overrides, stated_tables
from sslkit.recipe.resolve import Recipe, as_saved, build_recipe, changes, read_tables
from sslkit.recipe.schema import check_plain
from sslkit.text import pluralize

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
                f"choose a new or empty folder: {same_command(output=free_folder(folder))}"
            )
        return
    if resume == "never":
        raise UserError(
            f"--output {folder}: already holds a run; --resume never needs a new or empty folder: "
            f"{same_command(output=free_folder(folder))}"
        )
    try:
        before = read_tables(saved)
    except UserError as error:
        raise UserError(f"{error}; a run cannot be resumed without a readable recipe.toml") from error
    if changed := _changed(before, recipe):
        raise UserError(f"--output {folder}: {_other_run(folder, before, recipe, changed)}")


def _other_run(folder: Path, before: dict[str, Any], recipe: Recipe, changed: list[str]) -> str:
    """Why a folder's run cannot be continued with a recipe, and the commands that do what may be meant."""
    free = free_folder(folder)
    from_run, anew = same_command(output=free, resume=str(folder)), same_command(output=free)
    keys = {line.partition(":")[0] for line in changed}
    train = before.get("train")
    epochs = train.get("epochs") if isinstance(train, dict) else None
    if keys <= {"train.epochs", "monitor.every_epochs"} and isinstance(epochs, int) and recipe.train.epochs > epochs:
        return (
            f"holds a run of {pluralize(epochs, 'epoch')}, and the schedule of {recipe.train.epochs} is another; to "
            f"train its newest checkpoint on in a new folder: {from_run}"
        )
    from_it = "" if any(line.startswith(SAME_KEYS) for line in changed) else f"; to start from this run: {from_run}"
    return (
        f"holds a run of another recipe: {_list_changes(changed)}; to train in another folder: {anew}{from_it}; to "
        f"continue this run, give its own recipe, {folder / 'recipe.toml'}"
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


def keep_earlier_defaults(folder: Path, recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Let a run keep the defaults that it started with, unless the recipe states the keys; with messages.

    ``[data] background`` was "keep", and ``[monitor] every_epochs`` was 0 even if there was ``data``. Where the recipe
    says ``[train] precision = "auto"``, a run keeps the precision that was chosen at its start, on any device.
    """
    try:
        saved = folder / "recipe.toml"
        before = read_tables(saved) if saved.is_file() else {}
    except UserError:  # `check_folder` reports it
        return recipe, []
    data, monitor = before.get("data"), before.get("monitor")
    recipe, messages = _keep_precision(folder, recipe, before.get("train"))
    # The key is in the saved recipe if the run was resumed before.
    old_background = isinstance(data, dict) and data.get("background", KEEP) == KEEP
    if old_background and "background" not in recipe.data.model_fields_set:
        recipe = replace(recipe, data=recipe.data.model_copy(update={"background": KEEP}))
        messages.append(
            f'{folder}: this run started with [data] background = "keep", the only behaviour before the key existed, '
            "and keeps it; another background needs a new folder"
        )
    measured = recipe.monitor.every_epochs and "every_epochs" not in recipe.monitor.model_fields_set
    if measured and isinstance(monitor, dict) and monitor.get("every_epochs") == 0:
        remarks = tuple(remark for remark in recipe.remarks if not remark.startswith("[monitor]"))
        recipe = replace(recipe, monitor=recipe.monitor.model_copy(update={"every_epochs": 0}), remarks=remarks)
        messages.append(f"{folder}: this run started with [monitor] every_epochs = 0, without kNN, and keeps it")
    return recipe, messages


def _keep_precision(folder: Path, recipe: Recipe, saved: Any) -> tuple[Recipe, list[str]]:
    """In place of ``auto`` the precision in the saved ``[train]`` table, with a message if it is another one here."""
    before = saved.get("precision") if isinstance(saved, dict) else None
    here = chosen_precision(recipe)
    if recipe.train.precision != "auto" or before not in ("no", "bf16", "fp16"):
        return recipe, []
    kept = replace(recipe, train=recipe.train.model_copy(update={"precision": before}))
    if before == here:
        return kept, []
    return kept, [
        f'{folder}: this run started with [train] precision = "{before}" and keeps it; on this device "auto" is '
        f'"{here}", for a new run'
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
    found = source
    source, messages = restore_images(folder, found, recipe.data.max_bad_share)
    messages += _how_to_add_images(folder, recipe, found, source)
    checkpoint, problems = find_checkpoint(folder, recipe, resume)
    return source, checkpoint, [*messages, *problems]


def _how_to_add_images(folder: Path, recipe: Recipe, found: ImageSource, source: ImageSource) -> list[str]:
    """The command that trains on images which were added since the run started, if there are any."""
    if not found.root or found is source or set(found.paths()) <= set(source.paths()):
        return []
    if find_method(recipe.method_name).negatives == "bank":
        command = same_command(output=free_folder(folder))
        return [f"{recipe.method_name} has a memory of every image; to train on them too, start anew: {command}"]
    period, newest = len(found) // recipe.train.batch_size, max(saved_steps(folder / "checkpoints"), default=0)
    epochs = max(recipe.train.epochs, newest // max(period, 1) + 1)
    longer = [f"train.epochs={epochs}"] if epochs > recipe.train.epochs else []
    command = same_command(output=free_folder(folder), resume=str(folder), overrides=longer)
    return [f"to train on them too, from the newest checkpoint in a new folder: {command}"]


def _newest_of_run(folder: Path, recipe: Recipe) -> tuple[Checkpoint | None, list[str]]:
    newest, broken = newest_checkpoint(folder / "checkpoints")
    if newest is not None:
        check_saved_by_run(newest, folder, recipe)
    return newest, broken


def find_checkpoint(folder: Path, recipe: Recipe, resume: str) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, if any, and a message for each damaged one that was skipped.

    A run that was started from another run's checkpoint continues from its own.
    """
    path = Path(resume)
    if resume in ("auto", "never") or (has_begun_from(path, folder)):
        return _newest_of_run(folder, recipe)
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


def load_resumed(resume: str, overrides: Overrides) -> Recipe:
    """The recipe of the run that ``--resume`` names, by its folder or by a checkpoint, with ``overrides`` on top.

    Raises:
        UserError: There is no run and no checkpoint, or the recipe is not valid.
    """
    check_path(resume, "--resume")
    path, name = Path(resume).absolute(), f"--resume {resume}: its recipe:"
    runs = (each for each in (path, path.parent, path.parent.parent) if (each / "checkpoints").is_dir())
    file = next((found for folder in runs if (found := folder / "recipe.toml").is_file()), None)
    if file is None and not (path / "manifest.json").is_file():
        raise UserError(f"--resume {resume}: has no checkpoint; give a run or checkpoint folder, auto or never")
    saved = as_saved(read_tables(file) if file else read_checkpoint(path).state["recipe"])
    check_plain(saved, name)
    before = build_recipe(saved, name=name, folder=file and file.parent).method_name
    method = stated_tables(overrides).get("method", {}).get("name", before)
    if canonical_name(method) != before:
        raise UserError(
            f"--resume {resume}: was trained with {before}, not {method}; to start anew, leave --resume out"
        )
    return build_recipe(saved, overrides, name, file and file.parent)


def is_of_other_run(checkpoint: Checkpoint, folder: Path) -> bool:
    """Whether a checkpoint was saved in another run folder than ``folder``."""
    return checkpoint.folder is not None and not checkpoint.folder.resolve().is_relative_to(folder.resolve())


def has_begun_from(path: Path, folder: Path) -> bool:
    """Whether the run in ``folder`` has already trained beyond a checkpoint of another run."""
    if path.resolve().is_relative_to(folder.resolve()):
        return False  # the run goes back to a checkpoint of its own
    own = max(saved_steps(folder / "checkpoints"), default=-1)
    named = NAME.fullmatch(path.name)
    theirs = [int(named[1])] if named else saved_steps(path / "checkpoints") or saved_steps(path)
    return own >= max(theirs, default=0) and own >= 0


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
