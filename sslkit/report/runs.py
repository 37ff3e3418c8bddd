"""What a run folder says, read for looking: its recipe, where it was made, and its logs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sslkit.data.folder import printable, to_text
from sslkit.durable import refuse_links
from sslkit.engine.lines import read_lines
from sslkit.errors import UserError, check_path
from sslkit.recipe import Recipe, load_recipe

Row = dict[str, Any]

LARGEST = 1e300  # float arithmetic on anything below stays finite for a while


@dataclass(frozen=True)
class RunRecord:
    """A run folder, read.

    Attributes:
        folder: Where it lies.
        name: What it is called on the page; no other run of the page has it.
        recipe: Its recipe.
        made_with: The header of its recipe.toml: versions, Python, platform, processes.
        metrics: The lines of metrics.jsonl, at least one.
        results: The lines of results.jsonl.
        diagnostics: The lines of diagnostics.jsonl.
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


def number(value: Any) -> float | None:
    """A finite number, or None: a page has no place for NaN."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST:
        return float(value)
    return None


def read_run(folder: Path, name: str = "") -> RunRecord:
    """Read a run folder.

    Args:
        folder: The run.
        name: What to call it; the folder's own name if empty.

    Raises:
        UserError: Not a run folder, nothing logged yet, or a log that is not one.
    """
    check_path(folder, "RUN")
    if not (folder / "recipe.toml").is_file():
        raise UserError(f"{folder}: not a run folder (no recipe.toml)")
    refuse_links(folder)  # pages and pictures are written into it
    recipe = load_recipe(folder / "recipe.toml")
    metrics = read_lines(folder / "metrics.jsonl")
    if not metrics:
        raise UserError(f"{folder}: nothing to draw yet, metrics.jsonl is empty")
    for line, row in enumerate(metrics, start=1):
        if not all(1e-9 < (number(row.get(key)) or 0.0) < 1e15 for key in ("step", "epoch")):
            raise UserError(
                f"{folder / 'metrics.jsonl'} line {line}: has no positive step and epoch, as every line must"
            )
    return RunRecord(
        folder,
        printable(to_text(name or folder.resolve().name)),
        recipe,
        _read_header(folder / "recipe.toml"),
        metrics,
        read_lines(folder / "results.jsonl"),
        read_lines(folder / "diagnostics.jsonl"),
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
