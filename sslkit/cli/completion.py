"""What the shell offers after Tab: names of recipes and methods. Other words are completed as files by the shell.

A completion must be fast: nothing here imports PyTorch or pydantic, so the names of methods are read from source code.
"""

import ast
import os
from pathlib import Path
from typing import Any

from typer.core import TyperArgument, TyperOption

import sslkit
from sslkit.recipe.shipped import shipped_recipes

VARIABLE = "_SSLKIT_COMPLETE"  # set by the scripts that Typer installs, when they ask for completions


def prepare_completion() -> None:
    """If the shell has started this process to complete a command line, make Typer fast and print a line an offer."""
    if VARIABLE not in os.environ:
        return
    os.environ["COLUMNS"] = "1000"  # else Typer breaks long descriptions, whose second lines fish would offer too
    kinds: tuple[Any, ...] = (TyperArgument, TyperOption)
    for kind in kinds:  # values stay text: Typer imports pydantic to convert them
        kind.process_value = lambda _self, _context, value: value


def complete_recipe(incomplete: str) -> list[tuple[str, str]]:
    """Shipped recipes with what they are, and TOML files of the current folder.

    Paths in other folders match nothing here, and the shell completes them.
    """
    offered = [(file.name, "") for file in sorted(Path().glob("*.toml"))]
    for name, file in shipped_recipes().items():
        if name.startswith(incomplete):
            with file.open(encoding="utf-8") as lines:
                offered.append((name, next(lines, "").strip("# \n").partition(" (")[0]))
    return offered


def complete_method(incomplete: str) -> list[str]:
    """Names of sslkit's methods, and of those of installed packages."""
    from importlib.metadata import entry_points

    catalogue = Path(sslkit.__file__).parent / "methods" / "__init__.py"
    names = [entry.name for entry in entry_points(group="sslkit.methods")]
    for node in ast.parse(catalogue.read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.AnnAssign)
            and ast.unparse(node.target) == "METHODS"
            and isinstance(node.value, ast.Dict)
        ):
            names += [
                key.value for key in node.value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)
            ]
    return sorted(name for name in names if name.startswith(incomplete))
