"""What a run's evaluations said of its newest weights, read from ``results.jsonl``."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CardScore:
    """One evaluation of the newest weights.

    Attributes:
        evaluation: Its name, such as ``knn k=20 temperature=0.07``.
        data: Its images, in words.
        measure: What is measured.
        value: The score, a share.
        interval: Its bootstrap 95 % interval, where there is one.
        protocol_hash: Equal for scores that may be compared; empty for a monitor's.
        others: The same measure of what it was compared with, by name.
    """

    evaluation: str
    data: str
    measure: str
    value: float
    interval: tuple[float, float] | None
    protocol_hash: str
    others: dict[str, float]


def newest_scores(run: Path) -> list[CardScore] | None:
    """The last score of each evaluation, data and protocol at the newest checkpoint; None where they cannot be read.

    A line of another shape, such as a killed run's last one or a stranger's, is passed over.
    """
    file = run / "results.jsonl"
    if not file.is_file():
        return []
    try:
        latest = (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    newest: dict[tuple[str, str, str], CardScore] = {}
    for line in lines:
        try:
            row = json.loads(line)
            if latest != f"step-{row['step']:08d}":
                continue
            score = _score(row)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
        newest[score.evaluation, score.data, score.protocol_hash] = score
    return list(newest.values())


def _score(row: dict[str, Any]) -> CardScore:
    interval = row.get("interval")
    if interval is not None:
        low, high = interval
        interval = (_share(low), _share(high))
    others = [each for each in row.get("scores", [])[1:] if isinstance(each["encoder"], str)]
    return CardScore(
        evaluation=str(row["evaluation"]),
        data=str(row["data"]),
        measure=str(row.get("measure", "top-1 accuracy")),
        value=_share(row["accuracy"]),
        interval=interval,
        protocol_hash=str(row.get("protocol_hash", "")),
        others={each["encoder"]: _share(each["accuracy"]) for each in others},
    )


def _share(value: object) -> float:
    number = float(value)  # type: ignore[arg-type]  # what cannot be one raises TypeError
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number
