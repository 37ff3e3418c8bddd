"""Removal of local paths from files that are published, and a check for access tokens."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w

from sslkit.errors import UserError, without_tokens
from sslkit.publish.card_scores import CardScore
from sslkit.recipe.resolve import Recipe, build_recipe, read_tables

TEXT_SUFFIXES = ("", ".json", ".md", ".toml", ".txt")
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
LOCAL_PATH = re.compile(r"(?P<kind>(?:local-dir:|file:(?://)?)?)(?:[A-Za-z]:[\\/]|[/~\\]).*", re.DOTALL)


def public_name(name: str) -> str:
    """The last part of an absolute or home path; other names unchanged."""
    match = LOCAL_PATH.fullmatch(name)
    if not match:
        return name
    kind = match["kind"] if match["kind"] == "local-dir:" else ""
    return kind + next((part for part in reversed(re.split(r"[\\/]+", name)) if part), "images")


def public_recipe(file: Path) -> tuple[Recipe, str]:
    """A run's recipe and its text, without local paths. The text is unchanged if it has none."""
    text, tables = file.read_text(encoding="utf-8"), read_tables(file)
    public = _public(tables)
    if public != tables:
        head = [line for line in text.splitlines() if line.startswith("#")]
        text = "\n".join([*head, "# paths are shortened to their last part", "", tomli_w.dumps(public)])
    return build_recipe(public, name=str(file)), text


def public_score(score: CardScore) -> CardScore:
    """The score without local paths in the names of its data and baselines."""
    location, colon, counts = score.data.partition(": ")
    others = {public_name(name): value for name, value in score.others.items()}
    return replace(score, data=f"{public_name(location)}{colon}{counts}", others=others)


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_public(each) for each in value]
    return public_name(value) if isinstance(value, str) else value


def refuse_tokens(folder: Path, source: str) -> None:
    """Check the text files of a folder, and the names and metadata in its weights, for access tokens.

    Raises `UserError` if a line looks like it has one. The message names ``source``, where the user may have put it.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in TEXT_SUFFIXES:
            refuse_tokens_in(file.read_text(encoding="utf-8", errors="replace"), file.name, source)
        elif file.suffix == ".safetensors":
            with file.open("rb") as stream:
                header = stream.read(min(int.from_bytes(stream.read(8), "little"), MAX_HEADER))
            refuse_tokens_in(header.decode("utf-8", errors="replace"), file.name, source)


def refuse_tokens_in(text: str, name: str, source: str) -> None:
    """Check the text of one file for access tokens; see `refuse_tokens`."""
    for number, line in enumerate(text.splitlines(), start=1):
        if without_tokens(line) != line:
            raise UserError(
                f"{name} would contain what looks like an access token, in line {number}; remove it from {source}, and "
                "revoke it if others could read it"
            )
