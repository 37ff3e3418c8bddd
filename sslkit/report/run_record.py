"""A run folder as a report needs it: recipe, versions and logs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sslkit.data.formats.folder_listing import printable, to_text
from sslkit.errors import UserError, check_path
from sslkit.files.atomic import refuse_links
from sslkit.files.jsonl_reader import Row, number, read_log
from sslkit.files.run_reader import RECIPE, RunReader
from sslkit.recipe.resolve import Recipe, load_saved


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder: its recipe and the rows of its logs. The name is unique among the runs of a report.

    ``versions`` are versions, platform and number of processes, from the comments at the top of the recipe.
    """

    folder: Path
    name: str
    recipe: Recipe
    versions: dict[str, str]
    metrics: list[Row]  # at least one
    results: list[Row]
    diagnostics: list[Row]

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, computed from the last row of metrics."""
        last = self.metrics[-1]
        return max(round(float(last["step"]) / float(last["epoch"])), 1)

    @property
    def num_images(self) -> int:
        """Images of an epoch: those of the data, without the last, incomplete batch."""
        return self.steps_per_epoch * self.recipe.train.batch_size

    @property
    def last_epoch(self) -> float:
        """Epoch of the last row of metrics."""
        return float(self.metrics[-1]["epoch"])

    def epoch_of(self, row: Row) -> float:
        """Epoch of a row; computed from its step if it has none."""
        if number(row.get("epoch")) is not None:
            return float(row["epoch"])
        return (number(row.get("step")) or 0.0) / self.steps_per_epoch


def read_run(folder: Path, name: str = "") -> RunRecord:
    """Read a run folder, named by ``name`` or else by itself; raises `UserError` if it is no run or has no metrics."""
    reader = RunReader(folder)
    reader.check()
    refuse_links(folder)  # reports and pictures are written into it
    recipe = load_saved(folder / RECIPE)
    metrics = read_log(folder / "metrics.jsonl")
    if not metrics.rows and metrics.invalid:
        line, problem = metrics.invalid[0]
        raise UserError(f"{metrics.file}: has no valid line (line {line} {problem})")
    if not metrics.rows:
        raise UserError(f"{folder}: the run has not logged anything yet (metrics.jsonl is empty)")
    return RunRecord(
        folder,
        printable(to_text(name or folder.resolve().name)),
        recipe,
        reader.versions(),
        *map(reader.rows, ("metrics", "results", "diagnostics")),
    )


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read several runs. Folders of the same name are named by as much of their paths as makes them differ.

    Raises as `read_run`, and if a run is given twice.
    """
    for folder in folders:
        check_path(folder, "RUN")
    paths = [folder.resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path}: given twice; give each run once")
    names = [path.name for path in paths]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in paths]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
