"""Which scores of a run belong together: those of one protocol on the same data, and no others."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sslkit.evaluate.protocol import protocol_hash

Row = dict[str, Any]
Series = tuple[str, str, str]  # evaluation, data, protocol's hash


def series_of(row: Mapping[str, Any]) -> Series:
    """What a result is a measurement of; rows of older versions of sslkit have no protocol, and an empty hash.

    A point of the monitor that had to leave images out belongs to its curve all the same.
    """
    protocol = row.get("protocol")
    digest = str(row.get("protocol_hash", ""))
    if isinstance(protocol, dict) and "left_out" in protocol:
        digest = protocol_hash({name: value for name, value in protocol.items() if name != "left_out"})
    return str(row.get("evaluation", "accuracy")), str(row.get("data", "")), digest


def by_series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each series, under a name that no other has: with its data or its hash where it takes them."""
    found: dict[Series, list[Row]] = {}
    for row in rows:
        found.setdefault(series_of(row), []).append(row)
    several = len({data for _, data, _ in found}) > 1
    names = {key: f"{key[0]}, {key[1]}" if several and key[1] else key[0] for key in found}
    shared = Counter(names.values())
    return {with_hash(names[key], key, shared[names[key]] > 1): members for key, members in found.items()}


def protocols_of(rows: Sequence[Row]) -> dict[Series, str]:
    """What to call each series in a table that has a column for the data."""
    found = {series_of(row) for row in rows}
    shared = Counter((evaluation, data) for evaluation, data, _ in found)
    return {key: with_hash(key[0], key, shared[key[:2]] > 1) for key in found}


def with_hash(name: str, key: Series, ambiguous: bool) -> str:
    """The name, and where that is not enough the protocol's hash."""
    return f"{name} [{key[2] or 'no protocol recorded'}]" if ambiguous else name
