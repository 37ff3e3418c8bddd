"""The run folder: whether it may be written to, what it holds to continue from, and what is read from it."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sslkit.data.decode.background import KEEP
from sslkit.data.formats.folder_listing import printable, to_text
from sslkit.data.sources.image_source import ImageSource
from sslkit.engine.checkpoint.format import Checkpoint, newest_checkpoint, read_checkpoint
from sslkit.engine.resilience.preemption import remove_marker
from sslkit.engine.run_folder.dataset_identity import DATA, IMAGES, recorded_names_digest, same_images, write_images
from sslkit.engine.run_folder.lock import PROBE, prepare_folder
from sslkit.errors import UserError, check_path
from sslkit.files.atomic import refuse_links, replace_text
from sslkit.files.jsonl_reader import rows_of
from sslkit.files.run_reader import LOCK
from sslkit.recipe.resolve import Recipe, as_saved, build_recipe, changes, read_tables
from sslkit.recipe.schema import check_plain

# What a first start writes before the recipe: whole, and aside; an earlier version wrote the recipe as .recipe.tmp.
FIRST_FILES = (
    *(LOCK, PROBE, ".recipe.tmp"),
    *(DATA, IMAGES),
    *(f".{name}.tmp" for name in (DATA, IMAGES, "recipe.toml")),
)
NAMED = 20  # differences that a sentence names
# Keys that do not change what is learned; a run may be continued with others.
FREE_KEYS = (
    *("data.workers", "data.worker_timeout", "data.max_bad_share"),
    *("train.max_steps", "train.processes", "train.shard", "train.log_every"),
    *("train.max_hours", "monitor.diagnose_every", "checkpoint.", "guard.", "track.", "reference."),
)


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: Where it lies.
        step: Updates made.
        stopped: Why it stopped before its end, though it could go on; empty if it did not.
    """

    folder: Path
    step: int
    stopped: str = ""

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return rows_of(self.folder / "metrics.jsonl")

    def results(self) -> list[dict[str, Any]]:
        """The lines of results.jsonl."""
        return rows_of(self.folder / "results.jsonl")


def check_folder(folder: Path, recipe: Recipe, resume: str) -> None:
    """Refuse a folder that is not ours to write to, before anything is written.

    A run begins with its ``recipe.toml``. A folder that holds only what a start writes before it counts as empty.
    """
    check_path(folder, "--output")
    check_path(resume, "--resume")
    try:
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        filled = folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to: {error.strerror}") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--output {folder}: {existing} is not a folder that can be written to")
    if not filled:
        return
    refuse_links(folder)
    saved, others = folder / "recipe.toml", _not_of_a_first_start(folder)
    if not saved.is_file():  # asked last, as another start may be writing it
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
        raise UserError(f"{error}, so this run cannot be continued") from error
    if changed := _changed(before, recipe):
        raise UserError(
            f"--output {folder}: holds a run of another recipe; choose another folder, continue the run by its own "
            f"recipe ({folder / 'recipe.toml'}), or undo: {_in_short(changed)}"
        )


def _not_of_a_first_start(folder: Path) -> list[str]:
    """What lies in a folder without a recipe beside what a first start writes, which may have been killed at it."""
    checkpoints = folder / "checkpoints"
    others = [entry for entry in folder.iterdir() if not (entry.is_file() and entry.name in FIRST_FILES)]
    if checkpoints in others and checkpoints.is_dir():
        others.remove(checkpoints)
        others += [entry for entry in checkpoints.iterdir() if not (entry.is_file() and entry.name == PROBE)]
    return sorted(str(entry.relative_to(folder)) for entry in others if entry.exists())


def _changed(before: dict[str, Any], recipe: Recipe) -> list[str]:
    """The keys in which a recipe differs from that of an earlier start, but for those that are free to change."""
    return [line for line in changes(with_defaults(before), recipe.as_tables()) if not line.startswith(FREE_KEYS)]


def as_begun(folder: Path, recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe as a run in ``folder`` began with it, where its keys are older than the recipe's, and what to say."""
    saved = folder / "recipe.toml"
    if "background" in recipe.data.model_fields_set or not saved.is_file():
        return recipe, []
    try:
        before = read_tables(saved).get("data")
    except UserError:  # which `check_folder` reports
        return recipe, []
    # An earlier continuation has written the key down, so that it is there and the recipe still does not name it.
    if not isinstance(before, dict) or before.get("background", KEEP) != KEEP:
        return recipe, []
    recipe = replace(recipe, data=recipe.data.model_copy(update={"background": KEEP}))
    return recipe, [
        f'{folder} began with [data] background = "keep", as every run did before that key existed: it goes on as it '
        "began; another background needs a new folder"
    ]


def _in_short(lines: list[str]) -> str:
    more = f"; and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
    return "; ".join(line[:200] for line in lines[:NAMED]) + more


def with_defaults(tables: dict[str, Any]) -> dict[str, Any]:
    """A recipe of an earlier version with the keys that it did not have yet; as it is, if it no longer is one."""
    try:
        return build_recipe(as_saved(tables)).as_tables()
    except UserError:
        return tables


@dataclass(frozen=True)
class Found:
    """What a start found in its folder.

    Attributes:
        source: The images to train on: those the run began with, if there is one.
        checkpoint: What to continue from; None: from the start.
        remarks: What the user should know of it.
    """

    source: ImageSource
    checkpoint: Checkpoint | None
    remarks: list[str]


def look_into(folder: Path, recipe: Recipe, resume: str, source: ImageSource) -> Found:
    """Look at all in a folder that decides how a start goes on; it must be held, so that no other run changes it.

    Args:
        folder: Run folder.
        recipe: What to train.
        resume: See `sslkit.engine.setup.train`.
        source: The images that are there now.

    Raises:
        UserError: The folder is not ours to write to, or what it holds cannot be continued so.
    """
    check_folder(folder, recipe, resume)
    source, remarks = same_images(folder, source, recipe.data.max_bad_share)
    checkpoint, complaints = find_checkpoint(folder, recipe, resume)
    return Found(source, checkpoint, [*remarks, *complaints])


def find_checkpoint(folder: Path, recipe: Recipe, resume: str) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to continue from, if any, and a sentence for each broken one passed over."""
    if resume in ("auto", "never"):
        newest, broken = newest_checkpoint(folder / "checkpoints")
        if newest is not None:
            check_own(newest, folder, recipe)
        return newest, broken
    path = Path(resume)
    complaints: list[str] = []
    if (path / "manifest.json").is_file():
        checkpoint = read_checkpoint(path)
    else:
        found, complaints = newest_checkpoint(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if found is None:
            raise UserError(f"--resume {resume}: no checkpoint there; give a run or checkpoint folder, auto or never")
        checkpoint = found
    check_plain(checkpoint.state["recipe"], f"--resume {resume}: its recipe:")
    differing = changes(with_defaults(checkpoint.state["recipe"]), recipe.as_tables())
    unfit = [line for line in differing if line.startswith(("method.", "backbone.", "optim.name", "optim.exclude"))]
    if unfit:
        raise UserError(f"--resume {resume}: was trained by another recipe, which must agree in: {_in_short(unfit)}")
    return checkpoint, complaints


def check_own(checkpoint: Checkpoint, folder: Path, recipe: Recipe) -> None:
    """See that a checkpoint in a run folder was saved by this run, and not by another from which it was copied.

    Raises:
        UserError: It was not; names the keys of the recipe that differ.
    """
    check_plain(checkpoint.state["recipe"], f"{checkpoint.folder}: its recipe:")
    cure = "move it away to continue from the one before it, or train from it in another folder by --resume"
    if changed := _changed(checkpoint.state["recipe"], recipe):
        raise UserError(f"{checkpoint.folder}: was saved by a run of another recipe: {_in_short(changed)}; {cure}")
    images = checkpoint.state.get("images")
    if images and (ours := recorded_names_digest(folder)) and images != ours:
        raise UserError(f"{checkpoint.folder}: was saved by a run on other images; {cure}")


def open_folder(folder: Path, recipe: Recipe, accelerator: Accelerator, source: ImageSource) -> None:
    """Make a held folder the recipe's run, or see that it still is; the first process does.

    Raises:
        UserError: It cannot be written to.
    """
    if not accelerator.is_main_process:
        return
    prepare_folder(folder)
    versions = {name: importlib.metadata.version(name) for name in ("sslkit", "torch", "timm", "accelerate")}
    header = "".join(f"# {name} {version}\n" for name, version in versions.items())
    header += f"# Python {platform.python_version()}, {platform.platform()}\n"
    header += f"# processes {accelerator.num_processes}, {accelerator.device.type}\n"
    try:
        write_images(folder, source)
        replace_text(folder / "recipe.toml", f"{header}\n{recipe.to_toml()}")  # last: with it the folder is a run
        remove_marker(folder)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to: {error}") from error
