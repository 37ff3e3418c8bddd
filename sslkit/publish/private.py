"""What a published file need not say: where on somebody's computer the images and weights lay."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w

from sslkit.publish.scores import CardScore
from sslkit.recipe import Recipe, build_recipe, read_tables

LOCAL = re.compile(r"(?P<kind>(?:local-dir:|file:(?://)?)?)(?:[A-Za-z]:[\\/]|[/~\\]).*", re.DOTALL)


def public_name(name: str) -> str:
    """A path from a computer's root or somebody's home, cut down to its last name; any other name as it is."""
    found = LOCAL.fullmatch(name)
    if not found:
        return name
    kind = found["kind"] if found["kind"] == "local-dir:" else ""
    return kind + next((part for part in reversed(re.split(r"[\\/]+", name)) if part), "images")


def public_recipe(file: Path) -> tuple[Recipe, str]:
    """A run's recipe and its text, without where on this computer anything lay; text that says no such thing stays."""
    text, tables = file.read_text(encoding="utf-8"), read_tables(file)
    public = _public(tables)
    if public != tables:
        head = [line for line in text.splitlines() if line.startswith("#")]
        text = "\n".join([*head, "# paths are cut down to their last names", "", tomli_w.dumps(public)])
    return build_recipe(public, name=str(file)), text


def public_score(score: CardScore) -> CardScore:
    """The score, its data and what it was compared with by public names."""
    place, colon, counts = score.data.partition(": ")
    others = {public_name(name): value for name, value in score.others.items()}
    return replace(score, data=f"{public_name(place)}{colon}{counts}", others=others)


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_public(each) for each in value]
    return public_name(value) if isinstance(value, str) else value
