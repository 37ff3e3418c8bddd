"""Options that several commands share, and how a function becomes a command that starts fast.

Options are annotated types, or dataclasses whose fields become options.
"""

import atexit
import dataclasses
import gc
import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from sslkit.cli.completion import complete_method, complete_recipe
from sslkit.errors import UserError
from sslkit.terminal import print_message

if TYPE_CHECKING:
    from sslkit.data.sources.image_source import DataConfig
    from sslkit.evaluate import Encoder, Splits
    from sslkit.evaluate.features.readouts import Readout
    from sslkit.plan.make_plan import Plan
    from sslkit.recipe.resolve import Recipe

Number = TypeVar("Number", int, float)
Command = TypeVar("Command", bound=Callable[..., None])

RecipeName = Annotated[
    str, typer.Argument(help="TOML file, or the name of a recipe; see sslkit recipes.", autocompletion=complete_recipe)
]
MethodName = Annotated[
    str, typer.Option(help="Method, such as moco_v2; see sslkit methods.", autocompletion=complete_method)
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override a recipe value; repeatable.")
]
Model = Annotated[str, typer.Argument(help="Run folder, exported folder, hf_hub:user/repo, or timm name.")]
LAYERS = (
    "out (the encoder's output); a block number such as -2 (mean of its patch tokens); last4 (class tokens of the last "
    "4 blocks); dino_vit_s (= last4); dino_vit_b (class token and mean of patch tokens of the last block). eval sweep "
    "takes several, separated by commas."
)
Layer = Annotated[str, typer.Option("--layer", "--layers", help=LAYERS)]
Baseline = Annotated[list[str] | None, typer.Option("--baseline", help="timm model to compare with; repeatable.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images; 0: none, decode in this one.")]
ImageColumn = Annotated[str, "Column of the images, if several hold images; for tar files their suffix, such as jpg."]
LabelColumn = Annotated[str, "Column of the labels, if it cannot be found by its type; for tar files their suffix."]
Background = Annotated[
    str, "Colour behind transparent pixels, or keep. Default: as in MODEL's recipe.toml, else white."
]
DataName = Annotated[str, "Configuration of the dataset, if it has several."]


@dataclasses.dataclass(frozen=True)
class RecipeOptions:
    """A recipe, and options that override it; or only ``--data``, for a plan that keeps what else is stated."""

    recipe: RecipeName = ""
    overrides: Overrides = None
    method: MethodName = ""
    backbone: Annotated[str, "timm name, such as resnet18."] = ""
    data: Annotated[str, "Folder of images, datasets id, or builtin:NAME. Alone: plan a run on them."] = ""

    def load(self) -> "Recipe":
        """Load the recipe, or plan one without measuring this machine; a UserError if it is not complete or valid."""
        from sslkit.recipe.resolve import load_recipe

        return load_recipe(self.recipe, self.stated()) if self.recipe else self.plan(hours=None).recipe

    def plan(self, hours: float | None) -> "Plan":
        """Plan a run; see `make_plan`."""
        from sslkit.plan.make_plan import make_plan
        from sslkit.recipe.overrides import stated_tables

        stated = stated_tables(self.stated())
        if "path" not in stated.get("data", {}):
            raise UserError(
                "give a recipe, such as quickstart, or --data with a folder of images, such as --data photos; missing: "
                "--data"
            )
        return make_plan(stated, hours, print_message)

    def stated(self) -> list[str]:
        """Everything that is stated, as ``table.key=value``."""
        given = {"method.name": self.method, "backbone.name": self.backbone, "data.path": self.data}
        return [f"{key}={json.dumps(value)}" for key, value in given.items() if value] + (self.overrides or [])

    def name(self) -> str:
        """Default name of a run or page: that of the recipe file, of method and backbone, or of the images."""
        from sslkit.methods import canonical_name
        from sslkit.recipe.overrides import stated_tables

        if self.recipe:
            return Path(self.recipe).stem
        if self.method and self.backbone:
            return f"{canonical_name(self.method)}_{self.backbone}"
        path = str(stated_tables(self.stated()).get("data", {}).get("path", ""))
        return Path(os.path.abspath(path.rpartition(":")[2])).name or "images"  # the root folder has no name


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Labelled images, and baselines to compare with."""

    data: Annotated[str, typer.Option("--data", help="Folder with one folder per class, datasets id, or builtin:NAME.")]
    data_name: DataName = ""
    image_column: ImageColumn = ""
    label_column: LabelColumn = ""
    train_split: Annotated[str, "Split to train on; all: everything, with a fifth held out for the test."] = "train"
    test_split: Annotated[str, "Split to test on. Default: test or val, else a fifth is held out."] = ""
    baseline: Baseline = None
    background: Background = ""

    def config(self, model: str) -> "DataConfig":
        """The images, as an encoder needs them."""
        return data_config(self.data, self.data_name, self.label_column, self.image_column, self.background, model)

    def splits(self) -> "Splits":
        """The training and the test split."""
        from sslkit.evaluate import Splits

        return Splits(self.train_split, self.test_split)


@dataclasses.dataclass(frozen=True)
class Probe(Labelled):
    """Labelled images, and how features of a frozen encoder are extracted from them."""

    crop_pct: Annotated[float, typer.Option(min=0, max=1, help="Crop relative to the image; 0: the model's.")] = 0.0
    cache: Annotated[bool, "Store features on disk for later evaluations."] = True
    workers: Workers = 0
    layer: Layer = "out"

    def readout(self, layer: str = "") -> "Readout":
        """The features of a layer, by default of ``--layer``."""
        from sslkit.evaluate.features.readouts import Readout
        from sslkit.evaluate.features.store import FeatureStore

        store = FeatureStore.default() if self.cache else None
        chosen = Readout.from_name(layer or self.layer)
        return dataclasses.replace(chosen, crop_pct=self.crop_pct, workers=self.workers, store=store)

    def comparison(self, model: str) -> dict[str, Any]:
        """Baselines and splits, as arguments of the evaluations of frozen features.

        The weights that a run began from are a baseline too, if they are to be had.
        """
        return {"baselines": [*starts_of(model), *(self.baseline or ())], "splits": self.splits()}


def command(app: typer.Typer, example: str, name: str | None = None) -> Callable[[Command], Command]:
    """Register a function as a command. Each field of a parameter that is a dataclass becomes an option."""

    def register(function: Command) -> Command:
        app.command(name, epilog=f"Example: {example}")(_expand(function))
        return function

    return register


def _expand(function: Callable[..., None]) -> Callable[..., None]:
    """The function with the annotated fields of dataclasses as parameters, and texts of annotations as their help."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    listed: dict[str, list[inspect.Parameter]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        owner = groups.get(name)
        fields = get_type_hints(owner, include_extras=True) if owner else {name: hints[name]}
        parameters = inspect.signature(owner).parameters.values() if owner else [parameter]
        listed[name] = [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=_with_help(fields[each.name]))
            for each in parameters
            if get_origin(fields[each.name]) is Annotated
        ]

    @wraps(function)
    def with_fields(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{each.name: given.pop(each.name) for each in listed[name]})
        function(**given)

    del with_fields.__wrapped__
    flat = [each for parameters in listed.values() for each in parameters]
    with_fields.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    with_fields.__annotations__ = {each.name: each.annotation for each in flat}
    return with_fields


def _with_help(annotation: Any) -> Any:
    """``Annotated[kind, "text"]`` as an option with this help."""
    kind, note = get_args(annotation)
    return Annotated[kind, typer.Option(help=note)] if isinstance(note, str) else annotation


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import modules without garbage collection, which takes a quarter of the time of PyTorch's import.

    Later collections skip the imported objects too, which makes them short and keeps memory shared with data workers.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # else nanobind reports leaks at exit
        gc.enable()


def find_background(given: str, model: str = "") -> str:
    """The value of ``--background`` (a UserError if it is not a colour), else of the model's recipe, else white."""
    from sslkit.data.decode.background import WHITE, check_background
    from sslkit.recipe.resolve import load_saved

    if given:
        try:
            return check_background(given)
        except ValueError as error:
            raise UserError(f"--background: {error}, not {given!r}") from None
    recipe = Path(model, "recipe.toml")
    with suppress(UserError):  # an evaluation does not need a valid recipe
        return load_saved(recipe).data.background if model and recipe.is_file() else WHITE
    return WHITE


def starts_of(model: str) -> "list[Encoder]":
    """The pretrained weights that a run began from, with its preprocessing; empty for random ones and other models."""
    from sslkit.evaluate import load_encoder
    from sslkit.publish.encoder_folder import create_start
    from sslkit.recipe.resolve import load_saved

    file = Path(model, "recipe.toml")
    recipe = None
    with suppress(UserError):  # an evaluation does not need a valid recipe
        recipe = load_saved(file) if model and file.is_file() else None
    try:
        start = create_start(recipe) if recipe else None
    except UserError as error:
        print_message(f"WARNING: {model}: is not compared with its start: {error}")
        return []
    return [dataclasses.replace(load_encoder(model), module=start[1], description=start[0])] if start else []


def data_config(
    path: str, name: str, label_column: str, image_column: str, background: str, model: str = ""
) -> "DataConfig":
    """The data that ``--data`` and related options describe, as the encoder ``model`` needs them."""
    from sslkit.data.sources.image_source import DataConfig

    if not path:
        raise UserError("--data: is empty; give a folder, a datasets id or builtin:fashion_mnist")
    columns: dict[str, Any] = {"label_column": label_column or None, "image_column": image_column or None}
    return DataConfig(path=path, name=name or None, background=find_background(background, model), **columns)


def parse_numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Numbers separated by commas, without duplicates."""
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise UserError(f"{option} {text}: must be a number, or several separated by commas") from None


def nonzero(settings: Any, *names: str) -> dict[str, Any]:
    """The named settings that are not 0; 0 stands for the protocol's own value."""
    return {name: value for name in names if (value := getattr(settings, name))}
