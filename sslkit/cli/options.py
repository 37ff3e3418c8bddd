"""Options that several commands share: dataclasses whose fields typer reads as if the command listed them."""

import dataclasses
import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from sslkit.errors import UserError

if TYPE_CHECKING:
    from sslkit.data.sources.image_source import DataConfig
    from sslkit.evaluate import Splits
    from sslkit.evaluate.features.readouts import Readout
    from sslkit.recipe.resolve import Recipe

Number = TypeVar("Number", int, float)

RecipeName = Annotated[str, typer.Argument(help="TOML file, or the name of a shipped recipe.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="table.key=value; may repeat.")]
MethodName = Annotated[str, typer.Option(help="Method, such as moco_v2.")]
Backbone = Annotated[str, typer.Option(help="timm name, such as resnet18.")]
Images = Annotated[str, typer.Option(help="Folder of images or datasets id.")]
Model = Annotated[str, typer.Argument(help="Run folder, exported folder, hf_hub:user/repo, or timm name.")]
Layer = Annotated[
    str,
    typer.Option(
        help="out; a block's number (-2: last but one), mean-pooled; last4: class tokens of the last 4 blocks side by "
        "side; dino_vit_s (last4) or dino_vit_b (last class token beside the mean of patch tokens)."
    ),
]
Baseline = Annotated[list[str] | None, typer.Option("--baseline", help="Also score this timm name; may repeat.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images.")]
ImageColumn = Annotated[
    str, typer.Option(help="Column of images, if several hold some; of tar files, the images' suffix, such as jpg.")
]
LabelColumn = Annotated[
    str, typer.Option(help="Column of labels, if it is not found by its type; of tar files, the labels' suffix.")
]
Background = Annotated[
    str,
    typer.Option(
        help="Colour that transparent pixels are composited over, or keep, which drops alpha. Default: as MODEL was "
        "trained, if that is a folder with a recipe.toml, else white."
    ),
]
Scratch = Annotated[bool, typer.Option(help="Also train the architecture from random weights.")]


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Which labelled images, and whom to compare with."""

    data: Annotated[str, typer.Option("--data", help="Folder with a folder per class, datasets id, or builtin:NAME.")]
    data_name: Annotated[str, typer.Option(help="The data set's configuration, if it has several.")] = ""
    image_column: ImageColumn = ""
    label_column: LabelColumn = ""
    train_split: Annotated[str, typer.Option(help="Split to learn from; all: everything, a fifth held out.")] = "train"
    test_split: Annotated[str, typer.Option(help="Split to score on. Default: test or val, else a fifth held out.")] = (
        ""
    )
    baseline: Baseline = None
    background: Background = ""

    def config(self, model: str) -> "DataConfig":
        """The images, for an encoder."""
        background = find_background(self.background, model)
        return data_config(self.data, self.data_name, self.label_column, self.image_column, background)

    def splits(self) -> "Splits":
        """The training and the test split."""
        from sslkit.evaluate import Splits

        return Splits(self.train_split, self.test_split)

    def comparison(self) -> dict[str, Any]:
        """Baselines and splits, as arguments of the evaluations of frozen features."""
        return {"baselines": self.baseline or (), "splits": self.splits()}


@dataclasses.dataclass(frozen=True)
class Frozen:
    """How features are taken from a frozen encoder."""

    crop_pct: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the shorter side kept, 0.1 to 1; 0: the model's own.")
    ] = 0.0
    cache: Annotated[bool, typer.Option(help="Keep features on disk for the next evaluation.")] = True
    workers: Workers = 0

    def readout(self, layer: str) -> "Readout":
        """What ``layer`` names, taken so."""
        from sslkit.evaluate.features.readouts import Readout
        from sslkit.evaluate.features.store import FeatureStore

        store = FeatureStore.default() if self.cache else None
        return dataclasses.replace(Readout.from_name(layer), crop_pct=self.crop_pct, workers=self.workers, store=store)


def shared(command: Callable[..., None]) -> Callable[..., None]:
    """Replace parameters that are dataclasses by their fields, for typer; the command gets the dataclasses."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}

    @wraps(command)
    def with_fields(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{each.name: given.pop(each.name) for each in dataclasses.fields(kind)})
        command(**given)

    listed: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            fields = get_type_hints(groups[name], include_extras=True)
            own = inspect.signature(groups[name]).parameters
            listed += [each.replace(annotation=fields[each.name]) for each in own.values()]
        else:
            listed.append(parameter.replace(annotation=hints[name]))
    listed = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in listed]
    del with_fields.__wrapped__
    with_fields.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]
    with_fields.__annotations__ = {each.name: each.annotation for each in listed}
    return with_fields


def find_background(given: str, model: str = "") -> str:
    """What ``--background`` says, else the recipe in the model's folder, else white.

    Raises:
        UserError: It names no colour.
    """
    from sslkit.data.decode.background import WHITE, check_background
    from sslkit.recipe.resolve import load_saved

    if given:
        try:
            return check_background(given)
        except ValueError as error:
            raise UserError(f"--background: {error}, not {given!r}") from None
    recipe = Path(model, "recipe.toml")
    with suppress(UserError):  # of a recipe that only the commands for runs need
        return load_saved(recipe).data.background if model and recipe.is_file() else WHITE
    return WHITE


def data_config(
    path: str, name: str = "", label_column: str = "", image_column: str = "", background: str = "white"
) -> "DataConfig":
    """What ``--data`` and its companions say."""
    from sslkit.data.sources.image_source import DataConfig

    if not path:
        raise UserError("--data: name a folder, a datasets id or builtin:fashion_mnist")
    return DataConfig(
        path=path,
        name=name or None,
        label_column=label_column or None,
        image_column=image_column or None,
        background=background,
    )


def numbers(option: str, words: str, kind: Callable[[str], Number]) -> list[Number]:
    """Numbers with commas between, each once."""
    try:
        return list(dict.fromkeys(kind(word) for word in words.split(",")))
    except ValueError:
        raise UserError(f"{option} {words}: write a number, or several with commas between") from None


def override(protocol: Any, **given: Any) -> Any:
    """A dataclass with those of the given values that are not 0, which stands for the protocol's own."""
    return dataclasses.replace(protocol, **{name: value for name, value in given.items() if value})


def recipe_from_words(recipe: str, overrides: list[str], method: str, backbone: str, data: str) -> "Recipe":
    """The recipe that a command's words ask for: a file or name, or method, backbone and data, or both.

    Raises:
        UserError: Neither.
    """
    from sslkit.recipe.resolve import build_recipe, load_recipe

    if recipe:
        given = {"method.name": method, "backbone.name": backbone, "data.path": data}
        return load_recipe(recipe, [f"{key}={json.dumps(word)}" for key, word in given.items() if word] + overrides)
    if not (method and backbone and data):
        raise UserError("give a recipe, or all of --method, --backbone and --data")
    tables = {"method": {"name": method}, "backbone": {"name": backbone}, "data": {"path": data}}
    return build_recipe(tables, overrides, name="command line")
