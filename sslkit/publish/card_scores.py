"""Scores of a run's newest weights, read from ``results.jsonl`` for the model card."""

from dataclasses import dataclass
from pathlib import Path

from sslkit.errors import UserError
from sslkit.files.jsonl_reader import Row, number
from sslkit.files.run_reader import RunReader


@dataclass(frozen=True)
class CardScore:
    """One evaluation of the newest weights: a value in [0, 1], its bootstrap 95 % interval, and those of baselines.

    ``protocol_hash`` is equal for comparable scores, and empty for evaluations during training.
    """

    evaluation: str  # such as "knn k=20 temperature=0.07"
    data: str
    measure: str
    value: float
    interval: tuple[float, float] | None
    protocol_hash: str
    others: dict[str, float]  # by the baseline's name


def newest_scores(run: Path) -> list[CardScore] | None:
    """The last score of each evaluation, data and protocol at the newest checkpoint; None if they cannot be read."""
    if not (run / "results.jsonl").is_file():
        return []
    try:
        latest, rows = RunReader(run).latest_step(), RunReader(run).rows("results")
    except UserError:
        return None
    if latest is None:
        return None
    newest: dict[tuple[str, str, str], CardScore] = {}
    for row in rows:
        if row["step"] == latest and "evaluation" in row and "data" in row:
            score = _score(row)
            newest[score.evaluation, score.data, score.protocol_hash] = score
    return list(newest.values())


def _score(row: Row) -> CardScore:
    others = {each.get("encoder"): number(each.get("accuracy")) for each in row.get("scores", [])[1:]}
    return CardScore(
        evaluation=row["evaluation"],
        data=row["data"],
        measure=row.get("measure", "top-1 accuracy"),
        value=float(row["accuracy"]),
        interval=(row["interval"][0], row["interval"][1]) if row.get("interval") else None,
        protocol_hash=row.get("protocol_hash", ""),
        others={name: value for name, value in others.items() if isinstance(name, str) and value is not None},
    )
