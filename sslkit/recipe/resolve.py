"""Read a TOML recipe and resolve it: every key gets a value, and all mistakes are reported at once.

A recipe is data; reading an untrusted one runs no code. Values are layered; later layers win: the defaults of the
tables, the paper (`Method.paper_defaults`), the view policy, the file, the command line (``--set``).
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import tomli_w
from pydantic import BaseModel, ValidationError

from sslkit.data.augment.view_layers import ROLES, flat_views, layer_views
from sslkit.data.augment.views_config import LocalTable, RoleTable, ViewsConfig, fill_later_keys, resolve_views
from sslkit.data.config import MixConfig
from sslkit.data.decode.background import KEEP
from sslkit.data.sources.image_source import DataConfig
from sslkit.errors import UserError, check_path, near_miss
from sslkit.methods import MethodOptions, canonical_name, find_method
from sslkit.parts.adaptation.adapt_config import AdaptConfig
from sslkit.parts.backbone import BackboneConfig, check_name
from sslkit.recipe import schema
from sslkit.recipe.cross_checks import contradictions, remarks_on_monitor
from sslkit.recipe.overrides import Overrides, apply_overrides, stated_tables
from sslkit.recipe.paper_defaults import origin_of_views, paper_defaults, values_of_another_run
from sslkit.recipe.schema import MAX_RECIPE_BYTES, TABLES, check_plain, keys_of
from sslkit.recipe.shipped import shipped_recipes

ACCUMULATION = (
    "accumulating gradients of small batches changes the loss, because every image meets fewer negatives; "
    "[train] micro_batch = n computes the loss and gradient of the whole batch in the memory of n images"
)
# Messages of pydantic in plainer words, by the type of the error.
TYPE_MESSAGES = {
    **dict.fromkeys(("float_parsing", "float_type"), "must be a number, such as 0.03"),
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "must be a whole number, such as 10"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "must be true or false"),
    **dict.fromkeys(("string_type",), "must be text in quotes"),
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list, such as [0.2, 1.0]"),
    "greater_than_equal": "must be {ge:g} or more",
    "greater_than": "must be more than {gt:g}",
    "less_than_equal": "must be {le:g} or less",
    "less_than": "must be less than {lt:g}",
    "literal_error": "must be one of {expected}",
}
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks
ALL_TABLES = ("method", *TABLES, "reference")


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe. Each attribute is a table."""

    method_name: str
    method: MethodOptions
    backbone: BackboneConfig
    adapt: AdaptConfig
    data: DataConfig
    views: ViewsConfig
    optim: schema.OptimConfig
    schedule: schema.ScheduleConfig
    train: schema.TrainConfig
    monitor: schema.MonitorConfig
    checkpoint: schema.CheckpointConfig
    guard: schema.GuardConfig
    track: schema.TrackConfig
    reference: dict[str, Any]  # free keys: published figures and their source
    remarks: tuple[str, ...] = field(default=(), compare=False)  # messages about values that were filled in

    @property
    def peak_lr(self) -> float:
        """The base learning rate, scaled by the batch size as ``[optim] lr_rule`` says."""
        ratio = self.train.batch_size / 256
        factors: dict[str, float] = {"linear": ratio, "sqrt": ratio**0.5, "none": 1.0}
        return self.optim.lr * factors[self.optim.lr_rule]

    def backbone_config(self) -> BackboneConfig:
        """The ``[backbone]`` table with its image size; by default the size of the views."""
        return self.backbone.model_copy(update={"img_size": self.backbone.img_size or self.views.size})

    def as_tables(self) -> dict[str, dict[str, Any]]:
        """All values of the recipe as plain data, ready for TOML or JSON; without ``[adapt]`` if it changes nothing."""
        tables = {
            name: getattr(self, name).model_dump(mode="json", exclude_none=True, by_alias=True)
            for name in ("method", *TABLES)
            if name != "adapt" or not self.adapt.changes_nothing
        }
        tables["method"] = {"name": self.method_name, **tables["method"]}
        return {**tables, "reference": self.reference}

    def to_toml(self) -> str:
        """The resolved recipe as TOML. Loading it gives an equal recipe."""
        return tomli_w.dumps(self.as_tables())


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Overrides | None = None) -> Recipe:
    """Read a recipe from a file, a shipped one by name, or from tables, and resolve it.

    The ``recipe.toml`` of a run folder keeps the views of its run, even if it is older than some keys of ``[views]``.
    In other recipes the policy fills missing keys. A UserError has one sentence per mistake.

    Args:
        source: Path of a TOML file, a name such as ``"mocov3_vits"``, or a dict of tables such as ``{"data": {"path":
            "photos"}, ...}``.
        overrides: Values that replace those of the recipe, such as ``{"train.epochs": 2}`` or ``{"train": {"epochs":
            2}}``, or ``["train.epochs=2"]`` as on the command line; see `apply_overrides`.
    """
    if isinstance(source, Mapping):
        return build_recipe(stated_tables(source, "recipe"), overrides)
    file = find_recipe(source)
    tables = _with_views_saved(read_tables(file)) if is_of_run(file) else read_tables(file)
    return build_recipe(tables, overrides, name=str(source), folder=file.parent)


def read_tables(file: Path) -> dict[str, Any]:
    """Read the tables of a TOML file of bounded size, without resolving them; a UserError if it is not valid TOML."""
    try:
        if file.stat().st_size > MAX_RECIPE_BYTES:
            raise UserError(f"{file}: more than {MAX_RECIPE_BYTES} bytes; a recipe is smaller")
        content = file.read_bytes()
        if content[:2] in UTF16:
            raise UserError(f"{file}: is encoded in UTF-16, but TOML must be UTF-8; save it as UTF-8")
        tables = tomllib.loads(content.decode("utf-8-sig"))  # editors on Windows write a byte order mark
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # tomllib raises more than its own error
        raise UserError(
            f"{file}: not a readable TOML file: {str(error)[:300]}{_toml_hint(file, str(error))}"
        ) from error
    check_plain(tables, str(file))
    return tables


def _toml_hint(file: Path, problem: str) -> str:
    if file.suffix in (".yaml", ".yml", ".json"):
        return "; recipes are TOML files: sslkit recipes show quickstart prints one"
    return '; text needs quotes, as in name = "moco_v2"' if problem.startswith("Invalid value") else ""


def load_saved(file: Path) -> Recipe:
    """Read the recipe that a run saved; see `as_saved`. A UserError if the file is not a recipe."""
    return build_recipe(as_saved(read_tables(file)), name=str(file))


def as_saved(tables: dict[str, Any]) -> dict[str, Any]:
    """The tables that a run saved, with the earlier behaviour for missing keys, which are newer than the run."""
    data, tables = tables.get("data"), _with_views_saved(tables)
    return {**tables, "data": {"background": KEEP, **data}} if isinstance(data, dict) else tables


def _with_views_saved(tables: dict[str, Any]) -> dict[str, Any]:
    views = tables.get("views")
    return {**tables, "views": fill_later_keys(views)} if isinstance(views, dict) else tables


def is_of_run(file: Path) -> bool:
    """Whether a recipe lies in a run folder, which always contains ``checkpoints``."""
    return file.name == "recipe.toml" and (file.parent / "checkpoints").is_dir()


def build_recipe(
    tables: dict[str, Any], overrides: Overrides | None = None, name: str = "recipe", folder: Path | None = None
) -> Recipe:
    """Resolve parsed tables; see `load_recipe`.

    ``name`` starts every error message. Pipeline files of ``[views]`` are searched in ``folder``.
    """
    own = tables = {table: dict(keys) if isinstance(keys, dict) else keys for table, keys in tables.items()}
    if overrides:
        tables = {table: dict(keys) if isinstance(keys, dict) else keys for table, keys in own.items()}
        apply_overrides(tables, overrides)
    check_plain(tables, name)
    _refuse(name, _shape_mistakes(tables) or _name_mistakes(tables))
    method_name = canonical_name(tables["method"]["name"])
    method = find_method(method_name)
    layered = _lay_over(paper_defaults(method, tables), tables)
    layered["views"], mistakes = resolve_views(layered["views"], folder)
    parsed: dict[str, Any] = {}
    for table, model in [("method", method.Options), *TABLES.items()]:
        keys = {key: value for key, value in layered[table].items() if (table, key) != ("method", "name")}
        try:
            parsed[table] = model.model_validate(keys)
        except ValidationError as error:
            mistakes += [_sentence(table, model, item) for item in error.errors()]
    _refuse(name, mistakes)
    parsed["monitor"] = parsed["monitor"].spread_over(parsed["train"].epochs)
    of_batch = method.remark_on_batch(parsed["method"], parsed["train"].batch_size)
    others = [of_batch, origin_of_views(tables.get("views", {}), parsed["views"])]
    others += remarks_on_monitor(own, stated_tables(overrides or []), parsed["data"].path, parsed["monitor"])
    remarks = (*values_of_another_run(method, tables, parsed), *filter(None, others))
    recipe = Recipe(method_name=method_name, **parsed, reference=tables.get("reference", {}), remarks=remarks)
    _refuse(name, contradictions(recipe))
    return recipe


def _refuse(name: str, mistakes: list[str]) -> None:
    if mistakes:
        raise UserError(*(f"{name} {mistake}" for mistake in mistakes))


def find_recipe(source: str | Path) -> Path:
    """Find the file of a recipe, given by path or by name."""
    check_path(source, "RECIPE")
    path, shipped = Path(source), shipped_recipes()
    if path.is_file():
        return path
    if path.stem in shipped and (str(source) == path.stem or path.parent.name == "recipes"):
        return shipped[path.stem]
    if (path / "recipe.toml").is_file():
        raise UserError(f"{source}: is a run folder, not a recipe; give {path / 'recipe.toml'}")
    if path.is_dir():
        raise UserError(
            f"{source}: is a folder, not a recipe; to train on images in it, add --data {source} to a recipe"
        )
    hint = near_miss(path.stem, shipped) or "; sslkit recipes lists the names"
    raise UserError(f"{source}: no such file, and no recipe of that name{hint}")


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List the keys in which two recipes (as tables) differ, as ``table.key: old -> new``."""
    lines = []
    for table in ALL_TABLES:
        flat = flat_views if table == "views" else dict
        before, after = (flat(each) if isinstance(each, dict) else {} for each in (old.get(table), new.get(table)))
        lines += [
            f"{table}.{key}: {before.get(key, '(none)')} -> {after.get(key, '(none)')}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        ]
    return lines


def _shape_mistakes(tables: dict[str, Any]) -> list[str]:
    """Check table names and types, and the three required keys."""
    mistakes = [
        f"[{table}]: unknown table{near_miss(table, ALL_TABLES)}; the tables are {', '.join(ALL_TABLES)}"
        for table in tables
        if table not in ALL_TABLES
    ]
    mistakes += [f"{table}: must be a table [{table}]" for table, keys in tables.items() if not isinstance(keys, dict)]
    for table, key in (("method", "name"), ("backbone", "name"), ("data", "path")):
        keys = tables.get(table)
        if table == "data" and isinstance(keys, dict) and "path" not in keys and "mix" in keys:
            continue
        if not isinstance(keys, dict) or key not in keys:
            mistakes.append(f"[{table}] {key}: missing; a recipe needs [method] name, [backbone] name and [data] path")
        elif not isinstance(keys[key], str):
            mistakes.append(f"[{table}] {key}: must be a string, not {keys[key]!r}")
    return mistakes


def _name_mistakes(tables: dict[str, Any]) -> list[str]:
    """Check the names of method and backbone. If one is unknown, also check the keys that need no defaults."""
    mistakes = []
    for check, name in ((canonical_name, tables["method"]["name"]), (check_name, tables["backbone"]["name"])):
        try:
            check(name)
        except UserError as error:
            mistakes.append(str(error))
    return mistakes + _key_mistakes(tables) if mistakes else []


def _key_mistakes(tables: Mapping[str, Any]) -> list[str]:
    """Check the keys of the tables that need no defaults, each for itself."""
    mistakes = []
    for table, model in TABLES.items():
        try:
            model.model_validate(tables.get(table, {}))
        except ValidationError as error:
            wrong = [item for item in error.errors() if item["type"] != "missing" and item["loc"]]
            mistakes += [_sentence(table, model, item) for item in wrong]
    return mistakes


def check_stated(tables: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """Check tables that state only a part of a recipe; raise a UserError with a sentence for each mistake."""
    check_plain(dict(tables), name)
    names = {"method": {"name": "moco_v2"}, "backbone": {"name": "resnet18"}}
    whole: dict[str, Any] = {**tables, **{table: {**keys, **tables.get(table, {})} for table, keys in names.items()}}
    _refuse(name, _shape_mistakes(whole) or _name_mistakes(whole) or _key_mistakes(tables))


def _lay_over(defaults: dict[str, dict[str, Any]], tables: dict[str, Any]) -> dict[str, dict[str, Any]]:
    layered = {table: {**defaults.get(table, {}), **tables.get(table, {})} for table in ("method", *TABLES)}
    layered["views"] = layer_views(defaults.get("views", {}), tables.get("views", {}))
    if layered["backbone"].get("pretrained"):
        # Pretrained weights have their own initialisation and position embedding.
        for key in ("init", "pos_embed"):
            if key not in tables["backbone"]:
                layered["backbone"].pop(key, None)
        if layered["backbone"]["pretrained"] is True:
            config: Any = timm.get_pretrained_cfg(tables["backbone"]["name"])
            layered["views"] = {"mean": config.mean, "std": config.std, **layered["views"]}
    args = layered["backbone"].get("args")
    if isinstance(args, dict) and args.get("in_chans", 3) != 3:
        layered["data"].setdefault("channels", args["in_chans"])
    asked, paper = tables.get("optim", {}).get("name"), defaults.get("optim", {}).get("name")
    if asked not in (None, paper):
        # The learning rate of the paper is for its optimizer; another optimizer needs its own.
        layered["optim"] = dict(tables["optim"])
    return layered


def _where_key_is(table: str, key: str, model: type[BaseModel]) -> str:
    """Which other tables have a key, and which keys the table has."""
    others = [name for name, each in TABLES.items() if key in keys_of(each)]
    elsewhere = f"; it is a key of {' and '.join(f'[{name}]' for name in others)}" if others else ""
    return f"{elsewhere}; [{table}] has {', '.join(keys_of(model)) or 'no keys'}"


def _sentence(table: str, model: type[BaseModel], item: Any) -> str:
    """One pydantic error as a sentence with table, key and the nearest valid name."""
    key = str(item["loc"][0]) if item["loc"] else ""
    if table == "views" and key in ROLES and len(item["loc"]) > 1:
        return _sentence(f"views.{key}", LocalTable if key == "local" else RoleTable, {**item, "loc": item["loc"][1:]})
    if table == "data" and key == "mix" and len(item["loc"]) > 1:
        return _sentence(f"data.mix {item['loc'][1] + 1}", MixConfig, {**item, "loc": item["loc"][2:]})
    if table == "train" and "accumulat" in key:
        return f"[train] {key}: {ACCUMULATION}"
    if item["type"] == "extra_forbidden":
        return f"[{table}] {key}: unknown key{near_miss(key, keys_of(model))}{_where_key_is(table, key, model)}"
    if item["type"] == "missing":
        return f"[{table}] {key}: missing"
    plain = TYPE_MESSAGES.get(item["type"], "").format_map(item.get("ctx", {}))
    message = plain or item["msg"].removeprefix("Value error, ")
    given = "" if isinstance(item["input"], dict) else f", not {item['input']!r}"
    return f"[{table}] {f'{key}: ' if key else ''}{message[0].lower()}{message[1:]}{given}"
