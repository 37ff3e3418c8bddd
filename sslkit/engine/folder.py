"""The run folder: whether it may be written to, what it holds to continue from, and what is read from it."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sslkit.data.background import KEEP
from sslkit.data.source import ImageSource
from sslkit.durable import refuse_links
from sslkit.engine.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from sslkit.engine.images import write_images
from sslkit.engine.lines import read_lines
from sslkit.errors import UserError
from sslkit.recipe import Recipe, as_saved, build_recipe, changes, read_tables
from sslkit.recipe_tables import check_plain

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
        return read_lines(self.folder / "metrics.jsonl")

    def results(self) -> list[dict[str, Any]]:
        """The lines of results.jsonl."""
        return read_lines(self.folder / "results.jsonl")


def check_folder(folder: Path, recipe: Recipe, resume: str) -> None:
    """Refuse a folder that is not ours to write to, before anything is written."""
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
    saved = folder / "recipe.toml"
    if not saved.is_file():
        raise UserError(f"--output {folder}: holds something that is not a run; choose a new or empty folder")
    if resume == "never":
        raise UserError(f"--output {folder}: already holds a run; --resume never needs a new or empty folder")
    try:
        before = read_tables(saved)
    except UserError as error:
        raise UserError(f"{error}, so this run cannot be continued") from error
    changed = [line for line in changes(with_defaults(before), recipe.as_tables()) if not line.startswith(FREE_KEYS)]
    if changed:
        raise UserError(
            f"--output {folder}: holds a run of another recipe; choose another folder or undo: {_in_short(changed)}"
        )


def as_begun(folder: Path, recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe as a run in ``folder`` began with it, where its keys are older than the recipe's, and what to say."""
    saved = folder / "recipe.toml"
    if "background" in recipe.data.model_fields_set or not saved.is_file():
        return recipe, []
    try:
        before = read_tables(saved).get("data")
    except UserError:  # which `check_folder` reports
        return recipe, []
    if not isinstance(before, dict) or "background" in before:
        return recipe, []
    recipe = replace(recipe, data=recipe.data.model_copy(update={"background": KEEP}))
    return recipe, [
        f'{folder} began before there was [data] background: it goes on as it began, with background = "keep"; name '
        "another in a new folder"
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


def find_checkpoint(folder: Path, recipe: Recipe, resume: str) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to continue from, if any, and a sentence for each broken one passed over."""
    if resume in ("auto", "never"):
        return newest_checkpoint(folder / "checkpoints")
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


def open_folder(folder: Path, recipe: Recipe, accelerator: Accelerator, source: ImageSource) -> None:
    """Create the run folder and write its recipe and which images it is of, whole or not at all."""
    versions = {name: importlib.metadata.version(name) for name in ("sslkit", "torch", "timm", "accelerate")}
    header = "".join(f"# {name} {version}\n" for name, version in versions.items())
    header += f"# Python {platform.python_version()}, {platform.platform()}\n"
    header += f"# processes {accelerator.num_processes}, {accelerator.device.type}\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / ".recipe.tmp"
        aside.write_text(f"{header}\n{recipe.to_toml()}", encoding="utf-8")
        write_images(folder, source)
        aside.replace(folder / "recipe.toml")
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to: {error}") from error
