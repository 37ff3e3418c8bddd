"""Comparison of the scores of several models, for protocols that all of them were evaluated with."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sslkit.errors import UserError
from sslkit.evaluate.verdict import Difference
from sslkit.text import join

Row = dict[str, Any]

# Settings that are digests, for which a sentence says more than the values.
DIGESTS = {
    "train_digest": "the training images differ",
    "test_digest": "the test images differ",
    "labels": "the classes or the labels of the images differ",
    "chosen": "the labelled images differ",
}


def comparable(rows: Mapping[str, Sequence[Row]], evaluation: str = "") -> list[dict[str, Row]]:
    """Group the newest scores of all models by protocol: for each protocol, one row per model.

    ``rows`` are the evaluations of each model, oldest first, with the keys ``evaluation``, ``protocol`` and
    ``protocol_hash``. Only those whose name starts with ``evaluation`` are taken. Protocols that a model lacks are left
    out. Raises `UserError` for fewer than two models, a model without scores, or no common protocol.
    """
    if len(rows) < 2:
        raise UserError("eval compare: name two or more models")
    newest: dict[str, dict[str, Row]] = {}
    for model, evaluations in rows.items():
        matching = [row for row in evaluations if "protocol_hash" in row and row["evaluation"].startswith(evaluation)]
        if not matching:
            raise UserError(f"eval compare: {model} has no scores" + (f" of {evaluation}" if evaluation else ""))
        newest[model] = {row["protocol_hash"]: row for row in matching}
    first, *others = newest.values()
    shared = [digest for digest in first if all(digest in other for other in others)]
    if not shared:
        raise UserError(f"eval compare: the models have no protocol in common: {_differences(newest)}")
    return [{model: found[digest] for model, found in newest.items()} for digest in shared]


def best_sentence(group: Mapping[str, Row]) -> str:
    """One sentence: which model of a group of `comparable` is best, and how far the others are from it.

    Only the scores and their intervals are stored, so the difference is that of independent samples.
    """
    best, *others = sorted(group, key=lambda model: -group[model]["accuracy"])
    differences = {model: _unpaired_difference(group[best], group[model]) for model in others}
    if not others or any(each is None for each in differences.values()):
        return ""
    above = [f"above {model} by {each.size}" for model, each in differences.items() if each and each.is_better]
    equal = [
        str(each).replace("seen", f"seen from {model}", 1)
        for model, each in differences.items()
        if each and not each.is_better
    ]
    return f"The highest score is that of {best}: {join([*above, *equal])}"


def _unpaired_difference(first: Row, second: Row) -> Difference | None:
    """How much better the first score is, from the intervals of both; None if one has no interval."""
    if not first.get("interval") or not second.get("interval"):
        return None
    halves = [(row["interval"][1] - row["interval"][0]) / 2 for row in (first, second)]
    points, half = 100 * (first["accuracy"] - second["accuracy"]), 100 * math.hypot(*halves)
    return Difference(points, points - half, points + half, 0)


def _differences(newest: Mapping[str, Mapping[str, Row]]) -> str:
    """The settings that differ between the first model's newest score and the most similar score of each model."""
    first = _settings(list(next(iter(newest.values())).values())[-1])
    settings = {}
    for model, found in newest.items():
        latest_first = [_settings(row) for row in reversed(list(found.values()))]
        settings[model] = min(latest_first, key=lambda each: len(_differing_keys(first, each)))
    differences = []
    for name in sorted({name for each in settings.values() for name in _differing_keys(first, each)}):
        values = {model: repr(each[name]) if name in each else "not recorded" for model, each in settings.items()}
        listed = ", ".join(f"{value} ({model})" for model, value in values.items())
        differences.append(DIGESTS.get(name, f"{name}: {listed}"))
    return "; ".join(differences)


def _settings(row: Row) -> dict[str, Any]:
    return {"evaluation": row["evaluation"], **row["protocol"]}


def _differing_keys(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    names = first.keys() | other.keys()
    return [name for name in names if json.dumps(first.get(name)) != json.dumps(other.get(name))]  # tuples equal lists
