"""Scores side by side, of one protocol or not at all."""

from collections.abc import Mapping, Sequence
from typing import Any

from sslkit.errors import UserError

Row = dict[str, Any]


def comparable(rows: Mapping[str, Sequence[Row]], evaluation: str = "") -> list[dict[str, Row]]:
    """Group every model's newest scores by protocol; only protocols that every model was judged by.

    Args:
        rows: By model, its evaluations, oldest first: each with ``evaluation``, ``protocol``, ``protocol_hash``,
            ``accuracy`` and ``interval``.
        evaluation: Start of the evaluations' names that count, such as ``knn``.

    Returns:
        For each protocol, the models' rows.

    Raises:
        UserError: Fewer than two models, one without scores, or none judged alike; names what differs.
    """
    if len(rows) < 2:
        raise UserError("eval compare: name two or more models")
    newest: dict[str, dict[str, Row]] = {}
    for model, judged in rows.items():
        fitting = [row for row in judged if "protocol_hash" in row and row["evaluation"].startswith(evaluation)]
        if not fitting:
            raise UserError(f"eval compare: {model} has no scores" + (f" of {evaluation}" if evaluation else ""))
        newest[model] = {row["protocol_hash"]: row for row in fitting}
    first, *others = newest.values()
    shared = [digest for digest in first if all(digest in other for other in others)]
    if not shared:
        raise UserError(f"eval compare: no protocol in common, so nothing to compare: {_differences(newest)}")
    return [{model: found[digest] for model, found in newest.items()} for digest in shared]


def _differences(newest: Mapping[str, Mapping[str, Row]]) -> str:
    """What the models' newest scores differ in, setting by setting."""
    last = {model: list(found.values())[-1] for model, found in newest.items()}
    settings = {model: {"evaluation": row["evaluation"], **row["protocol"]} for model, row in last.items()}
    names = sorted({name for each in settings.values() for name in each})
    differing = [name for name in names if len({repr(each.get(name)) for each in settings.values()}) > 1]
    return "; ".join(
        f"{name}: " + ", ".join(f"{each.get(name)!r} ({model})" for model, each in settings.items())
        for name in differing
    )
