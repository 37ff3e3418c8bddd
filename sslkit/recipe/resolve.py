"""A recipe: what was asked for, typed. TOML in, every mistake reported at once, fully resolved TOML out.

A recipe is data; reading a stranger's runs no code. Layers, later ones win: the models' own defaults, the paper's
(`Method.paper_defaults`), the view policy's, the file's, the command line's ``--set``.
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import tomli_w
from pydantic import BaseModel, ValidationError

from sslkit.data.augment.policies import POLICIES
from sslkit.data.augment.view_layers import ROLES, flat_views, layer_views
from sslkit.data.augment.views_config import LocalTable, RoleTable, ViewsConfig, fill_later_keys, resolve_views
from sslkit.data.config import MixConfig
from sslkit.data.decode.background import KEEP
from sslkit.data.sources.image_source import DataConfig
from sslkit.errors import UserError, check_path, near_miss, path_problem
from sslkit.methods import MethodOptions, all_methods, canonical_name, find_method
from sslkit.methods.base import view_mistake
from sslkit.parts.backbone import BackboneConfig, check_name, takes_image_size
from sslkit.recipe.paper_defaults import numbers_of_another_run, origin_of_views, paper_defaults
from sslkit.recipe.schema import (
    MAX_RECIPE_BYTES,
    TABLES,
    CheckpointConfig,
    GuardConfig,
    MonitorConfig,
    OptimConfig,
    ScheduleConfig,
    TrackConfig,
    TrainConfig,
    check_plain,
)

ACCUMULATION = (
    "accumulating the gradients of small batches is another loss, in which every image meets fewer negatives; "
    "[train] micro_batch = n gives the whole batch's loss and gradient in the memory of n images"
)
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # how such a file begins
ALL_TABLES = ("method", *TABLES, "reference")


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe. Each attribute is a table; ``reference`` is free: published figures and their source.

    ``remarks`` are sentences for the user about numbers that were filled in.
    """

    method_name: str
    method: MethodOptions
    backbone: BackboneConfig
    data: DataConfig
    views: ViewsConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    train: TrainConfig
    monitor: MonitorConfig
    checkpoint: CheckpointConfig
    guard: GuardConfig
    track: TrackConfig
    reference: dict[str, Any]
    remarks: tuple[str, ...] = field(default=(), compare=False)

    @property
    def peak_lr(self) -> float:
        """The base rate times the batch rule."""
        ratio = self.train.batch_size / 256
        factors: dict[str, float] = {"linear": ratio, "sqrt": ratio**0.5, "none": 1.0}
        return self.optim.lr * factors[self.optim.lr_rule]

    def backbone_config(self) -> BackboneConfig:
        """The ``[backbone]`` table with its image size: that of the views, unless it states one."""
        return self.backbone.model_copy(update={"img_size": self.backbone.img_size or self.views.size})

    def as_tables(self) -> dict[str, dict[str, Any]]:
        """Every number of the recipe as plain data, ready for TOML or JSON."""
        tables = {
            name: getattr(self, name).model_dump(mode="json", exclude_none=True, by_alias=True) for name in TABLES
        }
        method = {"name": self.method_name, **self.method.model_dump(mode="json", exclude_none=True)}
        return {"method": method, **tables, "reference": self.reference}

    def to_toml(self) -> str:
        """The resolved recipe as TOML that loads back to an equal recipe."""
        return tomli_w.dumps(self.as_tables())


def load_recipe(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from a file, or a shipped one by name, and resolve it.

    The ``recipe.toml`` of a run folder keeps the views that the run made, also where it is older than keys of
    ``[views]``. In any other recipe the policy fills them in.

    Args:
        source: Path of a TOML file, or a name such as ``"mocov3_vits"``.
        overrides: ``"table.key=value"`` strings, values in TOML (bare words are taken as strings).

    Raises:
        UserError: One sentence for each mistake: file, table, key, what is wrong, the near miss.
    """
    file = find_recipe(source)
    tables = read_tables(file)
    tables = _with_views_saved(tables) if is_of_run(file) else tables
    return build_recipe(tables, overrides, name=str(source), folder=file.parent)


def read_tables(file: Path) -> dict[str, Any]:
    """The tables of a TOML file, plain and of bounded size, not resolved.

    Raises:
        UserError: It is none.
    """
    try:
        if file.stat().st_size > MAX_RECIPE_BYTES:
            raise UserError(f"{file}: more than {MAX_RECIPE_BYTES} bytes; no recipe needs so much said")
        content = file.read_bytes()
        if content[:2] in UTF16:
            raise UserError(f"{file}: saved as UTF-16, where TOML is UTF-8; save it again with the encoding UTF-8")
        tables = tomllib.loads(content.decode("utf-8-sig"))  # editors on Windows begin a file with a mark
    except (OSError, ValueError, RecursionError) as error:  # tomllib lets out more than its own error
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not a readable TOML file: {str(error)[:300]}") from error
    check_plain(tables, str(file))
    return tables


def load_saved(file: Path) -> Recipe:
    """Read the recipe that a run saved; see `as_saved`.

    Raises:
        UserError: It is none.
    """
    return build_recipe(as_saved(read_tables(file)), name=str(file))


def as_saved(tables: dict[str, Any]) -> dict[str, Any]:
    """The tables that a run saved, with what it did where a key is newer than the run and its default does otherwise.

    A run saves every key, so that one which is not there is newer.
    """
    data, tables = tables.get("data"), _with_views_saved(tables)
    return {**tables, "data": {"background": KEEP, **data}} if isinstance(data, dict) else tables


def _with_views_saved(tables: dict[str, Any]) -> dict[str, Any]:
    views = tables.get("views")
    return {**tables, "views": fill_later_keys(views)} if isinstance(views, dict) else tables


def is_of_run(file: Path) -> bool:
    """Whether a recipe is the one that a run saved in its folder, which has ``checkpoints`` from its start on."""
    return file.name == "recipe.toml" and (file.parent / "checkpoints").is_dir()


def build_recipe(
    tables: dict[str, Any], overrides: list[str] | None = None, name: str = "recipe", folder: Path | None = None
) -> Recipe:
    """Resolve parsed tables; see `load_recipe`. ``name`` opens each error; ``folder`` may hold pipeline files."""
    tables = {table: dict(keys) if isinstance(keys, dict) else keys for table, keys in tables.items()}
    for override in overrides or []:
        _apply_override(tables, override)
    check_plain(tables, name)
    if mistakes := _shape_mistakes(tables) or _name_mistakes(tables):
        raise _refusal(name, mistakes)
    method_name = canonical_name(tables["method"]["name"])
    method = find_method(method_name)
    defaults = paper_defaults(method, tables)
    layered = _lay_over(defaults, tables)
    layered["views"], of_views = resolve_views(layered["views"], folder)
    mistakes += of_views
    parsed: dict[str, Any] = {}
    for table, model in [("method", method.Options), *TABLES.items()]:
        keys = {key: value for key, value in layered[table].items() if (table, key) != ("method", "name")}
        try:
            parsed[table] = model.model_validate(keys)
        except ValidationError as error:
            mistakes += [_sentence(table, model, item) for item in error.errors()]
    if mistakes:
        raise _refusal(name, mistakes)
    of_batch = method.remark_on_batch(parsed["method"], parsed["train"].batch_size)
    others = [of_batch, origin_of_views(tables.get("views", {}), parsed["views"])]
    remarks = (*numbers_of_another_run(method, tables, parsed), *filter(None, others))
    recipe = Recipe(method_name=method_name, **parsed, reference=tables.get("reference", {}), remarks=remarks)
    if mistakes := _contradictions(recipe):
        raise _refusal(name, mistakes)
    return recipe


def _refusal(name: str, mistakes: list[str]) -> UserError:
    return UserError(*(f"{name} {mistake}" for mistake in mistakes))


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with sslkit, by name."""
    here = Path(__file__).resolve().parents[1]
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe given by path or by name."""
    check_path(source, "RECIPE")
    path = Path(source)
    shipped = shipped_recipes()
    if path.is_file():
        return path
    if str(source) in shipped:
        return shipped[str(source)]
    if path.stem in shipped and path.parent.name == "recipes":
        return shipped[path.stem]
    hint = near_miss(path.stem, shipped) or "; sslkit recipes lists the names"
    raise UserError(f"{source}: no such file, and no recipe of that name{hint}")


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Name each key in which two recipes (as tables) differ, as ``table.key: old -> new``."""
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


def _apply_override(tables: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    table, dot, key = name.strip().partition(".")
    if not (equals and dot and table and key):
        raise UserError(f"--set {override}: write table.key=value, for example train.epochs=10")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    *path, last = [table, *key.split(".")]
    if table == "views" and isinstance(tables.get("views", {}), dict):
        for part in [last, *reversed(path[1:])]:
            value = {part: value}
        tables["views"] = layer_views(tables.get("views", {}), value)
        return
    target: Any = tables
    for part in path:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise UserError(f"--set {override}: {part} is no table but {target!r}")
    target[last] = value


def _shape_mistakes(tables: dict[str, Any]) -> list[str]:
    """Unknown tables, tables that are none, and the three keys that every recipe must have."""
    mistakes = [
        f"[{table}]: unknown table{near_miss(table, ALL_TABLES)}" for table in tables if table not in ALL_TABLES
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
    """Unknown method or backbone; without them defaults are unknown, but keys given wrong can be told all the same."""
    mistakes = []
    for check, name in ((canonical_name, tables["method"]["name"]), (check_name, tables["backbone"]["name"])):
        try:
            check(name)
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        for table, model in TABLES.items():
            try:
                model.model_validate(tables.get(table, {}))
            except ValidationError as error:
                mistakes += [_sentence(table, model, item) for item in error.errors() if item["type"] != "missing"]
    return mistakes


def _lay_over(defaults: dict[str, dict[str, Any]], tables: dict[str, Any]) -> dict[str, dict[str, Any]]:
    layered = {table: {**defaults.get(table, {}), **tables.get(table, {})} for table in ("method", *TABLES)}
    layered["views"] = layer_views(defaults.get("views", {}), tables.get("views", {}))
    if layered["backbone"].get("pretrained"):
        # Weights that are being continued bring their own initialisation and position embedding.
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
        # The paper's rates belong to the paper's optimizer; another one must bring its own.
        layered["optim"] = dict(tables["optim"])
    return layered


def _sentence(table: str, model: type[BaseModel], item: Any) -> str:
    """One pydantic error as a sentence with table, key and near miss."""
    key = str(item["loc"][0]) if item["loc"] else ""
    if table == "views" and key in ROLES and len(item["loc"]) > 1:
        return _sentence(f"views.{key}", LocalTable if key == "local" else RoleTable, {**item, "loc": item["loc"][1:]})
    if table == "data" and key == "mix" and len(item["loc"]) > 1:
        return _sentence(f"data.mix {item['loc'][1] + 1}", MixConfig, {**item, "loc": item["loc"][2:]})
    if table == "train" and "accumulat" in key:
        return f"[train] {key}: {ACCUMULATION}"
    if item["type"] == "extra_forbidden":
        known = [field.alias or name for name, field in model.model_fields.items()]
        return f"[{table}] {key}: unknown key{near_miss(key, known)}"
    if item["type"] == "missing":
        return f"[{table}] {key}: missing"
    message = item["msg"].removeprefix("Value error, ")
    given = "" if isinstance(item["input"], dict) else f", not {item['input']!r}"
    where = f"[{table}] {key}:" if key else f"[{table}]"
    return f"{where} {message[0].lower() + message[1:]}{given}"


def _path_mistakes(recipe: Recipe) -> list[str]:
    """Paths that could not be written down; what names data or weights may be one."""
    named = [*recipe.data.paths(), ("[monitor] data", recipe.monitor.data)]
    named.append(("[backbone] pretrained", str(recipe.backbone.pretrained)))
    return [f"{key}: {fault}" for key, path in named if (fault := path_problem(path))]


def _contradictions(recipe: Recipe) -> list[str]:
    """What no single table can know."""
    mistakes = _path_mistakes(recipe)
    if recipe.schedule.warmup_epochs > recipe.train.epochs:
        mistakes.append(
            f"[schedule] warmup_epochs: {recipe.schedule.warmup_epochs:g} epochs of warm-up do not fit in "
            f"[train] epochs = {recipe.train.epochs}"
        )
    if recipe.backbone.img_size and not takes_image_size(recipe.backbone.name):
        mistakes.append(
            f"[backbone] img_size: {recipe.backbone.name!r} takes images of any size; leave it out, [views] size rules"
        )
    if recipe.checkpoint.keep_best and not recipe.monitor.every_epochs:
        mistakes.append(
            f"[checkpoint] keep_best: {recipe.checkpoint.keep_best!r} is measured by the monitor only; give "
            "[monitor] every_epochs and data"
        )
    if (recipe.data.channels or 3) != recipe.backbone.channels or recipe.data.channels == 3:
        mistakes.append(
            f"[data] channels: {recipe.data.channels}, but the backbone takes {recipe.backbone.channels}; leave it "
            "out, [backbone] args in_chans rules"
        )
    mistakes += [f"[views] {mistake}" for mistake in recipe.views.unfit_for(recipe.backbone.channels)]
    mistakes += _views_not_taken(recipe)
    if recipe.schedule.decay == "steps" and not recipe.schedule.milestones:
        mistakes.append("[schedule] milestones: decay = 'steps' needs the epochs at which the rate falls")
    return mistakes + _not_sharded(recipe)


def _views_not_taken(recipe: Recipe) -> list[str]:
    """Where the views that are made are not those that the method takes."""
    name, method, counts = recipe.method_name, find_method(recipe.method_name), recipe.views.counts()
    mistakes = []
    if view_mistake(name, method, "global", counts["global"]):
        mistakes.append(
            f"[method] name: {name} takes {method.views.get('global', 0)} global views, and sslkit makes "
            f"{counts['global']} of every image"
        )
    if mistake := view_mistake(name, method, "local", counts["local"]):
        of_policy = POLICIES[recipe.views.policy].get("local", {}).get("count", 0) == counts["local"] != 0
        origin = f" (of policy {recipe.views.policy!r})" if of_policy else ""
        mistakes.append(f"[views.local] count: {counts['local']}{origin}, but {mistake}")
    return mistakes


def _not_sharded(recipe: Recipe) -> list[str]:
    """What weights in parts have not been tried with."""
    train, name = recipe.train, recipe.method_name
    if not train.shard:
        return []
    fit = [each for each, method in all_methods().items() if method.shardable]
    unfit = {
        f"[method] name = {name!r}; take {', '.join(fit)}": name not in fit,
        f"[optim] name = {recipe.optim.name!r}; take adamw or sgd": recipe.optim.name not in ("adamw", "sgd"),
        "[train] precision = 'fp16'; take bf16": train.precision == "fp16",
        "[train] compile": train.compile,
        "[train] micro_batch": bool(train.micro_batch),
        "[monitor] layer_gradients": recipe.monitor.layer_gradients,
    }
    return [f"[train] shard: does not go with {what}" for what, found in unfit.items() if found]
