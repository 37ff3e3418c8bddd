"""Decide which checkpoints are kept: the newest few, one every few epochs, and the best."""

import re
from pathlib import Path

from sslkit.files.jsonl_reader import rows_of
from sslkit.recipe.schema import CheckpointConfig

NAME = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint of ``step``."""
    return f"step-{step:08d}"


def saved_steps(checkpoints: Path) -> set[int]:
    """The steps of the checkpoints in a ``checkpoints`` folder."""
    return {int(found[1]) for path in checkpoints.glob("step-*") if (found := NAME.fullmatch(path.name))}


def monitor_scores(results: Path, evaluation: str) -> dict[int, float]:
    """Accuracy by step in ``results.jsonl``, as the run's monitor measured it by an evaluation such as ``"knn"``."""
    return {
        row["step"]: float(row["accuracy"])
        for row in rows_of(results)
        if row.get("by") == "monitor" and row.get("evaluation", "").split(" ")[0] == evaluation
    }


def reasons_to_keep(
    steps: set[int], rules: CheckpointConfig, steps_per_epoch: int, scores: dict[int, float]
) -> dict[int, str]:
    """Map each step whose checkpoint the ``[checkpoint]`` table retains to the reasons.

    ``scores`` has the accuracy by step for ``keep_best``; the earliest of equal scores wins.
    """
    reasons: dict[int, list[str]] = {}
    for step in sorted(steps, reverse=True)[: rules.keep]:
        reasons.setdefault(step, []).append("newest" if step == max(steps) else "recent")
    for step in steps:
        epoch, rest = divmod(step, steps_per_epoch)
        if rules.keep_every_epochs and not rest and epoch and not epoch % rules.keep_every_epochs:
            reasons.setdefault(step, []).append(f"epoch {epoch}")
    if measured := sorted(steps & scores.keys()):
        best = max(measured, key=lambda step: scores[step])
        reasons.setdefault(best, []).append(f"best {rules.keep_best}, {scores[best]:.2%}")
    return {step: ", ".join(reasons[step]) for step in sorted(reasons)}
