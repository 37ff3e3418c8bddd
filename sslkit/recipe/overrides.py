"""Values that override a recipe: ``table.key=value`` strings, as on a command line, or a dict, as from Python."""

import numbers
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sslkit.data.augment.view_layers import layer_views
from sslkit.errors import UserError
from sslkit.recipe.schema import TABLES, keys_of

Overrides = Mapping[str, Any] | Sequence[str]


def stated_tables(overrides: Overrides, name: str = "overrides") -> dict[str, dict[str, Any]]:
    """The tables that overrides state, without defaults. ``name`` starts the error messages about a dict."""
    tables: dict[str, dict[str, Any]] = {}
    apply_overrides(tables, overrides, name)
    return tables


def apply_overrides(tables: dict[str, Any], overrides: Overrides | None, name: str = "overrides") -> None:
    """Set values in the tables of a recipe. Keys and values are checked later, by `build_recipe`.

    Args:
        tables: The tables, which are changed.
        overrides: ``"table.key=value"`` strings, values in TOML (bare words are taken as strings), later ones win; or a
            dict with keys such as ``"train.epochs"``, or a dict in it for each table, or both.
        name: Starts the error messages about a dict.

    Raises:
        UserError: An override does not name a key, or is not plain data.
    """
    if isinstance(overrides, Mapping):
        given = _nested(overrides, name)
        for table, keys in given.items():
            if not isinstance(keys, dict):
                raise UserError(f'{name} {table!r}: write table.key, for example {{"train.epochs": 10}}')
        if "views" in given and isinstance(tables.get("views", {}), dict):
            tables["views"] = layer_views(tables.get("views", {}), given.pop("views"))
        _merge(tables, given, f"{name} ")
        return
    if isinstance(overrides, str):
        raise UserError(f'overrides: must be a dict, for example {{"train.epochs": 10}}, not the string {overrides!r}')
    for override in overrides or ():
        _apply_words(tables, override)


def _nested(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A dict per table from a dict whose keys may have dots; all values are plain data."""
    nested: dict[str, Any] = {}
    for name, value in given.items():
        parts = name.split(".") if isinstance(name, str) else [""]
        if not all(parts):
            raise UserError(f'{where} {name!r}: keys are written as table.key, for example "train.epochs"')
        inner = _plain(value, f"{where} {name}")
        for part in reversed(parts):
            inner = {part: inner}
        _merge(nested, inner, f"{where} ")
    return nested


def _merge(tables: dict[str, Any], given: dict[str, Any], above: str) -> None:
    for key, value in given.items():
        if not isinstance(value, dict):
            tables[key] = value
            continue
        before = tables.setdefault(key, {})
        if not isinstance(before, dict):
            raise UserError(f"{above}{key}: is not a table but {before!r}")
        _merge(before, value, f"{above}{key}.")


def _plain(value: Any, where: str) -> Any:
    """The value as TOML can hold it: paths as strings, numbers of NumPy as Python's."""
    if isinstance(value, list | tuple):
        return [_plain(each, where) for each in value]
    if isinstance(value, Mapping):
        return _nested(value, where)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise UserError(f"{where}: must be a number, a string, a list or a dict, not {value!r}")


def _apply_words(tables: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    table, dot, key = name.strip().partition(".")
    if not (equals and dot and table and key):
        homes = [known for known, model in TABLES.items() if name.strip() in keys_of(model)] if equals else []
        example = f"{homes[0]}.{override.strip()}" if len(homes) == 1 else "train.epochs=10"
        raise UserError(f"--set {override}: write table.key=value, for example {example}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    *path, last = [table, *key.split(".")]
    if table == "views" and isinstance(tables.get("views", {}), dict):
        for part in [last, *reversed(path[1:])]:
            value = {part: value}
        tables["views"] = layer_views(tables.get("views", {}), value)
        return
    target: Any = tables
    for part in path:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise UserError(f"--set {override}: {part} is not a table but {target!r}")
    target[last] = value
