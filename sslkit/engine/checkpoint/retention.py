"""Which checkpoints stay: the newest few, one every so many epochs, the best. All of it is read from the disk."""

import re
from collections.abc import Iterable
from pathlib import Path

from sslkit.files.jsonl_reader import rows_of
from sslkit.recipe.schema import CheckpointConfig

NAME = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    """What the checkpoint of ``step`` is called."""
    return f"step-{step:08d}"


def by_step(folders: Iterable[Path]) -> list[Path]:
    """Checkpoints in the order of their steps, which names of nine digits are not in; other names come first."""

    def key(folder: Path) -> tuple[int, str]:
        found = NAME.fullmatch(folder.name)
        return (int(found[1]) if found else -1, folder.name)

    return sorted(folders, key=key)


def saved_steps(checkpoints: Path) -> set[int]:
    """The steps that a ``checkpoints`` folder has a checkpoint of."""
    return {int(found[1]) for each in checkpoints.glob("step-*") if (found := NAME.fullmatch(each.name))}


def monitor_scores(results: Path, evaluation: str) -> dict[int, float]:
    """Accuracy by step, as far as the run's own monitor measured it.

    Args:
        results: The run's ``results.jsonl``.
        evaluation: First word of the protocol, such as ``"knn"``.
    """
    return {
        row["step"]: float(row["accuracy"])
        for row in rows_of(results)
        if row.get("by") == "monitor" and row.get("evaluation", "").split(" ")[0] == evaluation
    }


def reasons_to_keep(
    steps: set[int], rules: CheckpointConfig, steps_per_epoch: int, scores: dict[int, float]
) -> dict[int, str]:
    """Say for each checkpoint that stays why it does.

    Args:
        steps: Those there are, all of one course of training.
        rules: The recipe's ``[checkpoint]``.
        steps_per_epoch: Whole global batches in the data.
        scores: What ``keep_best`` goes by, by step; the earlier of two equal ones is the better.
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
