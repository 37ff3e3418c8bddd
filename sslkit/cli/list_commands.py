"""``sslkit methods`` and ``sslkit recipes``: lists of what is available."""

import itertools
import sys

import typer

from sslkit.cli.options import Overrides, RecipeName, command
from sslkit.cli.output import console
from sslkit.terminal import PlainTable, print_text

recipes_app = typer.Typer(invoke_without_command=True, epilog="Example: sslkit recipes")


def methods() -> None:
    """List the methods."""
    from sslkit.methods import all_methods

    table = PlainTable("method", "paper")
    for name, method in sorted(all_methods().items()):
        doc = sys.modules[method.__module__].__doc__ or method.__doc__ or ""
        table.add_row(name, doc.strip().splitlines()[0])
    console.print(table)


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the recipes of sslkit, or show one."""
    if context.invoked_subcommand is not None:
        return
    from sslkit.recipe.shipped import shipped_recipes

    table = PlainTable("recipe", "description")
    for name, file in shipped_recipes().items():
        table.add_row(name, file.read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
    console.print(table)


@command(recipes_app, "sslkit recipes show mocov3_vits", "show")
def show_recipe(name: RecipeName, overrides: Overrides = None) -> None:
    """Print a recipe with all its values, including defaults, and the comment at its top."""
    from sslkit.recipe.resolve import find_recipe, load_recipe

    recipe = load_recipe(name, overrides)
    lines = find_recipe(name).read_text(encoding="utf-8-sig").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    print_text("\n".join([*comment, "", recipe.to_toml()]))
