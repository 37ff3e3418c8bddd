"""Scores side by side, of one protocol or not at all."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sslkit.errors import UserError

Row = dict[str, Any]

# Settings that are digests: no number would tell anybody more.
DIGESTS = {
    "train_digest": "the training images are not the same",
    "test_digest": "the test images are not the same",
    "labels": "the classes or the images' labels are not the same",
    "chosen": "not the same images have labels",
}


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
    """What the models' scores differ in, setting by setting: of each model's, those most like the first's newest."""
    first = _settings(list(next(iter(newest.values())).values())[-1])
    settings = {
        model: min(
            (_settings(row) for row in reversed(list(found.values()))), key=lambda each: len(_unlike(first, each))
        )
        for model, found in newest.items()
    }
    names = sorted({name for each in settings.values() for name in _unlike(first, each)})
    return "; ".join(
        DIGESTS.get(name)
        or f"{name}: " + ", ".join(f"{_in_words(each, name)} ({model})" for model, each in settings.items())
        for name in names
    )


def _settings(row: Row) -> dict[str, Any]:
    return {"evaluation": row["evaluation"], **row["protocol"]}


def _unlike(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of what two protocols do not share; as JSON, which knows no tuples."""
    names = first.keys() | other.keys()
    return [name for name in names if json.dumps(first.get(name)) != json.dumps(other.get(name))]


def _in_words(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "not recorded"
