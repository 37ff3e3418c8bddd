"""A recipe: what was asked for, typed. TOML in, every mistake reported at once, fully resolved TOML out.

A recipe is data; reading a stranger's runs no code. Layers, later ones win: the models' own defaults, the paper's
(`Method.paper_defaults`), the view policy's, the file's, the command line's ``--set``.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sslkit.data.source import DataConfig
from sslkit.data.views import POLICIES, ViewsConfig
from sslkit.errors import UserError, near_miss
from sslkit.methods import MethodOptions, canonical_name, find_method
from sslkit.parts.backbone import BackboneSpec, check_name, family, takes_image_size

ACCUMULATION = (
    "accumulating the gradients of small batches is another loss, in which every image meets fewer negatives; "
    "[train] micro_batch = n gives the whole batch's loss and gradient in the memory of n images"
)
PRETRAINED_SOURCES = ("hf_hub:", "hf-hub:", "local-dir:")
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BackboneConfig(_Table):
    """``[backbone]``; see `sslkit.parts.backbone.BackboneSpec`. ``img_size`` 0 means the size of the views."""

    name: str
    pretrained: bool | str = False
    img_size: int = Field(strict=True, default=0, ge=0)
    args: dict[str, Any] = Field(default_factory=dict)
    zero_init_last: bool | None = None
    init: Literal["timm", "moco_v3"] = "timm"
    pos_embed: Literal["timm", "sincos2d", "none"] = "timm"
    freeze_patch_embed: bool = False
    small_stem: bool = False

    @model_validator(mode="after")
    def _pretrained_source(self) -> "BackboneConfig":
        if isinstance(self.pretrained, str) and not self.pretrained.startswith(PRETRAINED_SOURCES):
            raise ValueError("pretrained is true, false, 'hf_hub:user/name' or 'local-dir:PATH'")
        return self


class OptimConfig(_Table):
    """``[optim]``.

    Attributes:
        name: ``sgd``, ``lars`` (MoCo v3's and BYOL's), ``lars_simclr`` and ``larc`` (SwAV's) have momentum without
            Nesterov; ``adamw`` and ``lamb`` have betas.
        lr: The paper's base rate, for a batch of 256.
        lr_rule: How the peak rate follows from it: ``linear`` times batch / 256, ``sqrt`` times its root, ``none``.
        weight_decay: Added to the gradient (sgd, lars) or decoupled (adamw, lamb).
        momentum: Of sgd, lars and larc.
        betas: Of adamw and lamb.
        exclude_from_decay: ``norm_and_bias`` frees tensors of at most one axis from weight decay; the papers decay
            everything, except that lars always frees them.
    """

    name: Literal["sgd", "lars", "lars_simclr", "larc", "adamw", "lamb"]
    lr: float = Field(ge=0.0)
    lr_rule: Literal["linear", "sqrt", "none"] = "linear"
    weight_decay: float = Field(ge=0.0)
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    exclude_from_decay: Literal["none", "norm_and_bias"] = "none"


class ScheduleConfig(_Table):
    """``[schedule]`` of the learning rate.

    Attributes:
        decay: How it falls from its peak.
        warmup_epochs: Linear rise before that, with every step.
        warmup_start: Rate at the start of the warm-up, as a share of the peak.
        final: Rate at the end of the cosine, as a share of the peak.
        milestones: Epochs at which ``steps`` multiplies the rate by ``factor``.
        per: Whether the decay moves every ``step`` or once per ``epoch``, as the paper does.
    """

    decay: Literal["cosine", "steps", "constant"]
    warmup_epochs: float = Field(default=0.0, ge=0.0)
    warmup_start: float = Field(default=0.0, ge=0.0, le=1.0)
    final: float = Field(default=0.0, ge=0.0, le=1.0)
    milestones: list[Annotated[float, Field(gt=0.0)]] = Field(default_factory=list)
    factor: float = Field(default=0.1, gt=0.0)
    per: Literal["step", "epoch"]


class TrainConfig(_Table):
    """``[train]``.

    Attributes:
        epochs: Passes over the data; the schedules span them.
        max_steps: Stop after so many updates (0: never); the schedules still span ``epochs``.
        batch_size: Global batch, over all processes.
        micro_batch: Images of a process in the backbone at a time, loss and gradient as ever (0: all at once).
        precision: Of autocast; ``no`` is float32.
        seed: Key of the sample order and of every random draw.
        clip_norm: Largest norm of the gradient; 0 leaves it alone, as the papers do.
        head_warmup_epochs: Epochs at the start in which only the heads learn: for a backbone that is continued.
        processes: How many processes this run must have; 0 takes what the launcher starts.
        log_every: Steps between lines of metrics.jsonl.
    """

    epochs: int = Field(strict=True, ge=1, le=1_000_000)
    max_steps: int = Field(strict=True, default=0, ge=0)
    batch_size: int = Field(strict=True, ge=2, le=10_000_000)
    micro_batch: int = Field(strict=True, default=0, ge=0)
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = Field(strict=True, default=0, ge=0, lt=2**63)
    clip_norm: float = Field(default=0.0, ge=0.0)
    head_warmup_epochs: float = Field(default=0.0, ge=0.0)
    processes: int = Field(strict=True, default=0, ge=0)
    log_every: int = Field(strict=True, default=10, ge=1)


class MonitorConfig(_Table):
    """``[monitor]``: kNN on a labelled set of its own, every so many epochs (0: never).

    Attributes:
        every_epochs: How often, and once at the end.
        data: A labelled source, in the words of ``[data] path``.
        name: Its configuration, if it has several.
        k: Neighbours.
        temperature: Of the neighbours' weights, exp(similarity / temperature).
        max_train: At most so many bank images, the first of a seeded order (0: all).
        layer_gradients: Log the gradient norm of every layer of the backbone: where instability begins (MoCo v3).
    """

    every_epochs: int = Field(strict=True, default=0, ge=0)
    data: str = ""
    name: str | None = None
    k: int = Field(strict=True, default=20, ge=1)
    temperature: float = Field(default=0.07, gt=0.0)
    max_train: int = Field(strict=True, default=0, ge=0)
    layer_gradients: bool = False

    @model_validator(mode="after")
    def _has_data(self) -> "MonitorConfig":
        if self.every_epochs and not self.data:
            raise ValueError("every_epochs needs data, a labelled source")
        return self


class CheckpointConfig(_Table):
    """``[checkpoint]``: save every so many steps and every so many minutes (0: never), keep the newest few."""

    every_steps: int = Field(strict=True, default=0, ge=0)
    every_minutes: float = Field(default=15.0, ge=0.0)
    keep: int = Field(strict=True, default=2, ge=1)


TABLES: dict[str, type[BaseModel]] = {
    "backbone": BackboneConfig,
    "data": DataConfig,
    "views": ViewsConfig,
    "optim": OptimConfig,
    "schedule": ScheduleConfig,
    "train": TrainConfig,
    "monitor": MonitorConfig,
    "checkpoint": CheckpointConfig,
}
ALL_TABLES = ("method", *TABLES, "reference")


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe. Each attribute is a table; ``reference`` is free: published figures and their source."""

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
    reference: dict[str, Any]

    @property
    def peak_lr(self) -> float:
        """The base rate times the batch rule."""
        ratio = self.train.batch_size / 256
        factors: dict[str, float] = {"linear": ratio, "sqrt": ratio**0.5, "none": 1.0}
        return self.optim.lr * factors[self.optim.lr_rule]

    def backbone_spec(self) -> BackboneSpec:
        """What `create_backbone` needs."""
        fields = self.backbone.model_dump()
        return BackboneSpec(**{**fields, "img_size": self.backbone.img_size or self.views.size})

    def as_tables(self) -> dict[str, dict[str, Any]]:
        """Every number of the recipe as plain data, ready for TOML or JSON."""
        tables = {name: getattr(self, name).model_dump(mode="json", exclude_none=True) for name in TABLES}
        method = {"name": self.method_name, **self.method.model_dump(mode="json", exclude_none=True)}
        return {"method": method, **tables, "reference": self.reference}

    def to_toml(self) -> str:
        """The resolved recipe as TOML that loads back to an equal recipe."""
        return tomli_w.dumps(self.as_tables())


def load_recipe(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from a file, or a shipped one by name, and resolve it.

    Args:
        source: Path of a TOML file, or a name such as ``"mocov3_vits"``.
        overrides: ``"table.key=value"`` strings, values in TOML (bare words are taken as strings).

    Raises:
        UserError: One sentence for each mistake: file, table, key, what is wrong, the near miss.
    """
    file = find_recipe(source)
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file}: not a readable TOML file: {error}") from error
    return build_recipe(tables, overrides, name=str(source))


def build_recipe(tables: dict[str, Any], overrides: list[str] | None = None, name: str = "recipe") -> Recipe:
    """Resolve tables that are already parsed; see `load_recipe`. ``name`` opens each error."""
    tables = {table: dict(keys) if isinstance(keys, dict) else keys for table, keys in tables.items()}
    for override in overrides or []:
        _apply_override(tables, override)
    if mistakes := _shape_mistakes(tables) or _name_mistakes(tables):
        raise _refusal(name, mistakes)
    method_name = canonical_name(tables["method"]["name"])
    method = find_method(method_name)
    layered = _lay_over(method.paper_defaults(family(tables["backbone"]["name"])), tables)
    mistakes += _fill_policy(layered)
    parsed: dict[str, Any] = {}
    for table, model in [("method", method.Options), *TABLES.items()]:
        keys = {key: value for key, value in layered[table].items() if (table, key) != ("method", "name")}
        try:
            parsed[table] = model.model_validate(keys)
        except ValidationError as error:
            mistakes += [_sentence(table, model, item) for item in error.errors()]
    if mistakes:
        raise _refusal(name, mistakes)
    recipe = Recipe(method_name=method_name, **parsed, reference=tables.get("reference", {}))
    if mistakes := _contradictions(recipe):
        raise _refusal(name, mistakes)
    return recipe


def _refusal(name: str, mistakes: list[str]) -> UserError:
    return UserError("\n".join(f"{name} {mistake}" for mistake in mistakes))


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with sslkit, by name."""
    here = Path(__file__).resolve().parent
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe given by path or by name."""
    path = Path(source)
    shipped = shipped_recipes()
    if path.is_file():
        return path
    if str(source) in shipped:
        return shipped[str(source)]
    if path.stem in shipped and path.parent.name == "recipes":
        return shipped[path.stem]
    raise UserError(f"{source}: no such file, and no recipe of that name{near_miss(path.stem, shipped)}")


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Name each key in which two recipes (as tables) differ, as ``table.key: old -> new``."""
    lines = []
    for table in ALL_TABLES:
        before, after = old.get(table, {}), new.get(table, {})
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
    except tomllib.TOMLDecodeError:
        value = text.strip()
    target: Any = tables
    *path, last = [table, *key.split(".")]
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
    if layered["backbone"].get("pretrained"):
        # Weights that are being continued bring their own initialisation and position embedding.
        for key in ("init", "pos_embed"):
            if key not in tables["backbone"]:
                layered["backbone"].pop(key, None)
        if layered["backbone"]["pretrained"] is True:
            config: Any = timm.get_pretrained_cfg(tables["backbone"]["name"])
            layered["views"] = {"mean": config.mean, "std": config.std, **layered["views"]}
    asked, paper = tables.get("optim", {}).get("name"), defaults.get("optim", {}).get("name")
    if asked not in (None, paper):
        # The paper's rates belong to the paper's optimizer; another one must bring its own.
        layered["optim"] = dict(tables["optim"])
    return layered


def _fill_policy(layered: dict[str, dict[str, Any]]) -> list[str]:
    policy = layered["views"].get("policy")
    if not isinstance(policy, str) or policy not in POLICIES:
        return [f"[views] policy: unknown policy {policy!r}{near_miss(str(policy), POLICIES)}; there are {[*POLICIES]}"]
    layered["views"] = {**POLICIES[policy], **layered["views"]}
    return []


def _sentence(table: str, model: type[BaseModel], item: Any) -> str:
    """One pydantic error as a sentence with table, key and near miss."""
    key = str(item["loc"][0]) if item["loc"] else ""
    if table == "train" and "accumulat" in key:
        return f"[train] {key}: {ACCUMULATION}"
    if item["type"] == "extra_forbidden":
        return f"[{table}] {key}: unknown key{near_miss(key, model.model_fields)}"
    if item["type"] == "missing":
        return f"[{table}] {key}: missing"
    message = item["msg"].removeprefix("Value error, ")
    given = "" if isinstance(item["input"], dict) else f", not {item['input']!r}"
    return f"[{table}] {key}: {message[0].lower() + message[1:]}{given}"


def _contradictions(recipe: Recipe) -> list[str]:
    """What no single table can know."""
    mistakes = []
    if recipe.schedule.warmup_epochs > recipe.train.epochs:
        mistakes.append(
            f"[schedule] warmup_epochs: {recipe.schedule.warmup_epochs:g} epochs of warm-up do not fit in "
            f"[train] epochs = {recipe.train.epochs}"
        )
    if recipe.backbone.img_size and not takes_image_size(recipe.backbone.name):
        mistakes.append(
            f"[backbone] img_size: {recipe.backbone.name!r} takes images of any size; leave it out, [views] size rules"
        )
    if recipe.schedule.decay == "steps" and not recipe.schedule.milestones:
        mistakes.append("[schedule] milestones: decay = 'steps' needs the epochs at which the rate falls")
    return mistakes
