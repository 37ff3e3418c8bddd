"""``sslkit.train`` and ``sslkit.plan_run``: what the commands do, from Python."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from sslkit.doctor.recipe_advice import advise_at_start
from sslkit.engine import Run
from sslkit.engine import train as train_recipe
from sslkit.errors import UserError
from sslkit.plan.make_plan import DEFAULT_HOURS, Plan, make_plan
from sslkit.recipe.overrides import Overrides, stated_tables
from sslkit.recipe.resolve import Recipe, load_recipe
from sslkit.terminal import print_message

MIN_HOURS, MAX_HOURS = 0.01, 10_000.0


@overload
def train(recipe: Recipe, output: str | Path, resume: str = "auto") -> Run: ...


@overload
def train(
    recipe: str | Path | Mapping[str, Any],
    overrides: Overrides | None = None,
    output: str | Path | None = None,
    resume: str = "auto",
) -> Run: ...


def train(  # type: ignore[misc]  # a run folder after a Recipe comes as ``overrides``
    recipe: Recipe | str | Path | Mapping[str, Any],
    overrides: Overrides | str | Path | None = None,
    output: str | Path | None = None,
    resume: str = "auto",
) -> Run:
    """Pretrain as a recipe says; continue if the run folder holds an unfinished run of the recipe.

    Settings that do not fit the images are reported at the start, as by ``sslkit pretrain``.

        sslkit.train("quickstart", {"train.epochs": 2})
        sslkit.train("quickstart", {"train": {"epochs": 2}}, output="runs/short")
        sslkit.train(sslkit.plan_run("photos").recipe, "runs/photos")

    Args:
        recipe: Name of a shipped recipe, path of a TOML file, or a dict of tables; or a `Recipe`, after which the run
            folder is the second argument.
        overrides: Values that replace those of the recipe; see `load_recipe`.
        output: Run folder. Default: ``runs/NAME`` of the recipe; for a dict ``runs/METHOD_BACKBONE``.
        resume: ``"auto"`` continues what the folder holds, ``"never"`` refuses to. The path of a checkpoint folder
            starts from that checkpoint.

    Raises:
        UserError: Recipe, data or folder cannot be used as they are. Nothing has been written then.
    """
    if isinstance(recipe, Recipe):
        if overrides is not None:  # the arguments are recipe, output and resume
            output, resume = _run_folder(overrides), str(output or resume)
        if output is None:
            raise UserError('output: missing; give the run folder, for example sslkit.train(recipe, "runs/photos")')
        return train_recipe(recipe, output, resume, advise_at_start)
    if isinstance(overrides, str | Path):
        raise UserError(
            f'overrides: must be a dict, for example {{"train.epochs": 10}}, not {str(overrides)!r}; a run folder is '
            f'given as output="{overrides}"'
        )
    loaded = load_recipe(recipe, overrides)
    name = f"{loaded.method_name}_{loaded.backbone.name}" if isinstance(recipe, Mapping) else Path(recipe).stem
    return train_recipe(loaded, output or Path("runs", name), resume, advise_at_start)


def _run_folder(given: Overrides | str | Path) -> str | Path:
    if isinstance(given, str | Path):
        return given
    raise UserError(
        f"overrides {given!r}: a Recipe has all its values; override them where it is made, for example "
        'sslkit.load_recipe("quickstart", {"train.epochs": 10})'
    )


def plan_run(data: str | Path, hours: float = DEFAULT_HOURS, overrides: Overrides | None = None) -> Plan:
    """Plan a run that fits these images, this machine and the time, as ``sslkit pretrain --data`` does.

    Measures a training step, which takes some seconds. The plan as text has each value with its reason;
    ``plan.recipe`` can be trained.

    Args:
        data: Folder of images, datasets id, or ``builtin:NAME``.
        hours: Time for the run, in hours.
        overrides: Values of a recipe that the plan keeps, such as ``{"backbone.name": "resnet50"}``; see `load_recipe`.

    Raises:
        UserError: The images cannot be used, are too few, or an override is wrong.
    """
    if not MIN_HOURS <= hours <= MAX_HOURS:
        raise UserError(f"hours: must be between {MIN_HOURS:g} and {MAX_HOURS:g}, for example 0.5, not {hours:g}")
    stated = stated_tables(overrides or {})
    return make_plan({**stated, "data": {**stated.get("data", {}), "path": str(data)}}, hours, print_message)
