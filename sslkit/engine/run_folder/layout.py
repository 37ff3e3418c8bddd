"""A run folder: what `train` returns, and what a start writes into it."""

import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sslkit.data.sources.image_source import ImageSource
from sslkit.engine.run_folder.dataset_identity import write_images
from sslkit.engine.run_folder.lock import prepare_folder, refuse_unwritable
from sslkit.files.atomic import replace_text
from sslkit.files.jsonl_reader import rows_of
from sslkit.files.run_reader import STOP_MARKER
from sslkit.recipe.resolve import Recipe


@dataclass(frozen=True)
class Run:
    """A run folder after ``step`` updates. ``stopped`` says why the run can be resumed; empty if it is finished."""

    folder: Path
    step: int
    stopped: str = ""

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return rows_of(self.folder / "metrics.jsonl")

    def results(self) -> list[dict[str, Any]]:
        """The rows of results.jsonl."""
        return rows_of(self.folder / "results.jsonl")


def open_folder(folder: Path, recipe: Recipe, accelerator: Accelerator, source: ImageSource) -> None:
    """Write recipe and image names into a locked run folder, on the first process; raise a UserError if it fails."""
    if not accelerator.is_main_process:
        return
    prepare_folder(folder)
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("sslkit", "torch", "timm", "accelerate"))
    platforms = f"Python {platform.python_version()}, {platform.platform()}"
    processes = f"processes {accelerator.num_processes}, {accelerator.device.type}"
    header = "".join(f"# {line}\n" for line in (*versions, platforms, processes))
    with refuse_unwritable(folder):
        write_images(folder, source)
        replace_text(folder / "recipe.toml", f"{header}\n{recipe.to_toml()}")  # last: it makes the folder a run
        (folder / STOP_MARKER).unlink(missing_ok=True)
