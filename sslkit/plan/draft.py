"""A recipe under construction: what the user stated, and what the plan chose, each value with its reason."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from sslkit.data.augment.view_layers import ROLES


@dataclass(frozen=True)
class Choice:
    """A value that the plan chose.

    Attributes:
        key: ``table.key`` of the recipe, or ``views.role.key``.
        value: As in a recipe.
        reason: Why, in half a sentence.
    """

    key: str
    value: Any
    reason: str


class Draft:
    """Tables of a recipe, filled in key by key. A value that the user stated is never changed."""

    def __init__(self, stated: Mapping[str, Mapping[str, Any]]) -> None:
        self.tables: dict[str, dict[str, Any]] = deepcopy({table: dict(keys) for table, keys in stated.items()})
        self.stated = {f"{table}.{key}" for table, keys in stated.items() for key in _keys(keys)}
        self.choices: dict[str, Choice] = {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``table.key``, stated or chosen so far."""
        *path, name = key.split(".")
        keys: dict[str, Any] = self.tables
        for part in path:
            keys = keys.get(part, {})
        return keys.get(name, default)

    def choose(self, key: str, value: Any, reason: str) -> None:
        """Set ``table.key``, unless the user stated it."""
        if key in self.stated:
            return
        *path, name = key.split(".")
        keys: dict[str, Any] = self.tables
        for part in path:
            keys = keys.setdefault(part, {})
        keys[name] = value
        self.choices[key] = Choice(key, value, reason)


def _keys(keys: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a table; those of a role of ``[views]`` as ``role.key``."""
    for key, value in keys.items():
        if key in ROLES and isinstance(value, Mapping):
            yield from (f"{key}.{inner}" for inner in value)
        else:
            yield key
