"""What a run folder says, read for looking: its recipe, where it was made, and its logs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sslkit.data.formats.folder_listing import printable, to_text
from sslkit.errors import UserError, check_path
from sslkit.files.atomic import refuse_links
from sslkit.files.jsonl_reader import Row, number, read_log, rows_of
from sslkit.recipe.resolve import Recipe, load_saved

__all__ = ["Row", "RunRecord", "number", "read_run", "read_runs"]


@dataclass(frozen=True)
class RunRecord:
    """A run folder, read.

    Attributes:
        folder: Where it lies.
        name: What it is called on the page; no other run of the page has it.
        recipe: Its recipe.
        made_with: The header of its recipe.toml: versions, Python, platform, processes.
        metrics: The rows of metrics.jsonl, at least one.
        results: The rows of results.jsonl.
        diagnostics: The rows of diagnostics.jsonl.
    """

    folder: Path
    name: str
    recipe: Recipe
    made_with: dict[str, str]
    metrics: list[Row]
    results: list[Row]
    diagnostics: list[Row]

    @cached_property
    def steps_per_epoch(self) -> int:
        """Updates in a pass over the data, as the last line of metrics implies."""
        last = self.metrics[-1]
        return max(round(float(last["step"]) / float(last["epoch"])), 1)

    @property
    def num_images(self) -> int:
        """Images of the whole batches of an epoch: the data's, less the last, incomplete batch."""
        return self.steps_per_epoch * self.recipe.train.batch_size

    def epoch_of(self, row: Row) -> float:
        """Where a result or diagnosis stands on the axis of epochs; a row without an epoch has its step."""
        if number(row.get("epoch")) is not None:
            return float(row["epoch"])
        return (number(row.get("step")) or 0.0) / self.steps_per_epoch


def read_run(folder: Path, name: str = "") -> RunRecord:
    """Read a run folder.

    Args:
        folder: The run.
        name: What to call it; the folder's own name if empty.

    Raises:
        UserError: Not a run folder, or nothing logged yet.
    """
    check_path(folder, "RUN")
    if not (folder / "recipe.toml").is_file():
        raise UserError(f"{folder}: not a run folder (no recipe.toml)")
    refuse_links(folder)  # pages and pictures are written into it
    recipe = load_saved(folder / "recipe.toml")
    metrics = read_log(folder / "metrics.jsonl")
    if not metrics.rows and metrics.odd:
        line = metrics.odd[0][0]
        raise UserError(
            f"{metrics.file} line {line}: has no positive step and epoch, as every line must; nor has another"
        )
    if not metrics.rows:
        raise UserError(f"{folder}: nothing to draw yet, metrics.jsonl is empty")
    return RunRecord(
        folder,
        printable(to_text(name or folder.resolve().name)),
        recipe,
        _read_header(folder / "recipe.toml"),
        *(rows_of(folder / f"{name}.jsonl") for name in ("metrics", "results", "diagnostics")),
    )


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read several runs and give each a name of its own: the folder's, or as much of its path as tells them apart.

    Raises:
        UserError: As `read_run`, or a run given twice.
    """
    for folder in folders:
        check_path(folder, "RUN")
    places = [folder.resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{place}: given twice; name each run once")
    names = [place.name for place in places]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(place.parts[-depth:]) for place in places]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_header(file: Path) -> dict[str, str]:
    """The comments that open a run's recipe, ``# torch 2.8.0``, by their first word."""
    header: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        found = re.fullmatch(r"# (\S+) (.+)", line)
        if not found:
            break
        header[found[1]] = found[2]
    return header
