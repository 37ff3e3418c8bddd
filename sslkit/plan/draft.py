"""A recipe under construction: what the user stated, and what the plan chose, each value with its reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """A value that the plan chose.

    Attributes:
        key: ``table.key`` of the recipe.
        value: As in a recipe.
        reason: Why, in half a sentence.
    """

    key: str
    value: Any
    reason: str


class Draft:
    """Tables of a recipe, filled in key by key. A value that the user stated is never changed."""

    def __init__(self, stated: Mapping[str, Mapping[str, Any]]) -> None:
        self.tables: dict[str, dict[str, Any]] = {table: dict(keys) for table, keys in stated.items()}
        self.stated = {f"{table}.{key}" for table, keys in stated.items() for key in keys}
        self.choices: dict[str, Choice] = {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``table.key``, stated or chosen so far."""
        table, _, name = key.partition(".")
        return self.tables.get(table, {}).get(name, default)

    def choose(self, key: str, value: Any, reason: str) -> None:
        """Set ``table.key``, unless the user stated it."""
        if key in self.stated:
            return
        table, _, name = key.partition(".")
        self.tables.setdefault(table, {})[name] = value
        self.choices[key] = Choice(key, value, reason)
