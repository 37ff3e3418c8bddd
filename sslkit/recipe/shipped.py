"""The recipes that come with sslkit. Importing this module is fast."""

from pathlib import Path


def shipped_recipes() -> dict[str, Path]:
    """The files of the shipped recipes, by name."""
    here = Path(__file__).resolve().parents[1]
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}
