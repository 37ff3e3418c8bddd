"""What a published file need not say: where on somebody's computer the images and weights lay."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import tomli_w

from sslkit.errors import UserError, without_tokens
from sslkit.publish.card_scores import CardScore
from sslkit.recipe.resolve import Recipe, build_recipe, read_tables

TEXT = ("", ".json", ".md", ".toml", ".txt")  # suffixes
LARGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
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


def refuse_tokens(folder: Path, source: str) -> None:
    """Look once more through what is about to leave: every text file, and the header of the weights.

    Args:
        folder: The files.
        source: What the user may have written a token into.

    Raises:
        UserError: One holds what looks like an access token; says in which line.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix not in (*TEXT, ".safetensors"):
            continue
        with file.open("rb") as stream:
            content = _header(stream) if file.suffix == ".safetensors" else stream.read()
        refuse_tokens_in(content.decode("utf-8", errors="replace"), file.name, source)


def refuse_tokens_in(text: str, name: str, source: str) -> None:
    """The same for one file's text."""
    for number, line in enumerate(text.splitlines(), start=1):
        if without_tokens(line) != line:
            raise UserError(
                f"{name} would hold what looks like an access token, in line {number}; take it out of {source}, and "
                "revoke it if others could read it"
            )


def _header(stream: BinaryIO) -> bytes:
    """What a safetensors file says of itself: names and metadata."""
    return stream.read(min(int.from_bytes(stream.read(8), "little"), LARGEST_HEADER))


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
