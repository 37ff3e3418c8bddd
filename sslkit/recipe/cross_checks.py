"""Checks of a recipe that involve several tables."""

import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sslkit.data.augment.policies import POLICIES
from sslkit.errors import UserError, path_problem
from sslkit.methods import all_methods, find_method
from sslkit.methods.base import VIEW_ROLES, Method
from sslkit.parts.backbone import takes_image_size
from sslkit.recipe.schema import MonitorConfig
from sslkit.text import pluralize

if TYPE_CHECKING:
    from sslkit.recipe.resolve import Recipe


def contradictions(recipe: "Recipe") -> list[str]:
    """Check values of different tables against each other; returns one sentence per mistake."""
    return [*_path_mistakes(recipe), *_pairs_that_do_not_fit(recipe), *_views_not_taken(recipe), *_not_sharded(recipe)]


def _path_mistakes(recipe: "Recipe") -> list[str]:
    """Check that all paths can be written to TOML."""
    named = [*recipe.data.paths(), ("[monitor] data", recipe.monitor.data)]
    named.append(("[backbone] pretrained", str(recipe.backbone.pretrained)))
    return [f"{key}: {fault}" for key, path in named if (fault := path_problem(path))]


def _pairs_that_do_not_fit(recipe: "Recipe") -> Iterator[str]:
    """Check keys of two tables against each other."""
    backbone, schedule, channels = recipe.backbone, recipe.schedule, recipe.data.channels
    warmup, epochs, keep_best = schedule.warmup_epochs, recipe.train.epochs, recipe.checkpoint.keep_best
    if warmup > epochs:
        fit = f"do not fit in [train] epochs = {epochs}; set warmup_epochs = {epochs / 10:g}"
        yield f"[schedule] warmup_epochs: {warmup:g} epochs of warm-up {fit}"
    if schedule.decay == "steps" and not schedule.milestones:
        yield "[schedule] milestones: decay = 'steps' needs the epochs of the learning rate drops, such as [120, 160]"
    if backbone.img_size and not takes_image_size(backbone.name):
        yield f"[backbone] img_size: {backbone.name!r} takes images of any size; leave it out and set [views] size"
    if keep_best and not recipe.monitor.every_epochs:
        yield f"[checkpoint] keep_best: {keep_best!r} needs the monitor; set [monitor] every_epochs and data"
    if (channels or 3) != backbone.channels or channels == 3:
        fit = f"the backbone takes {backbone.channels}"
        yield f"[data] channels: {channels}, but {fit}; leave it out and set [backbone] args.in_chans"
    partial = [key for key in ("last_blocks", "lora_rank", "anchor") if getattr(recipe.adapt, key)]
    if partial and not backbone.pretrained:
        yield f"[adapt] {partial[0]}: there is nothing to keep of random weights; set [backbone] pretrained"
    yield from (f"[views] {mistake}" for mistake in recipe.views.unfit_for(backbone.channels))


def _views_not_taken(recipe: "Recipe") -> Iterator[str]:
    """Compare the configured views with those that the method takes."""
    name, method, counts = recipe.method_name, find_method(recipe.method_name), recipe.views.counts()
    if view_mistake(name, method, "global", counts["global"]):
        takes = f"{name} takes {method.views.get('global', 0)} global views"
        yield f"[method] name: {takes}, but sslkit makes {counts['global']} of each image"
    if mistake := view_mistake(name, method, "local", counts["local"]):
        of_policy = POLICIES[recipe.views.policy].get("local", {}).get("count", 0) == counts["local"] != 0
        origin = f" (of policy {recipe.views.policy!r})" if of_policy else ""
        yield f"[views.local] count: {counts['local']}{origin}, but {mistake}"


def remarks_on_monitor(
    own: Mapping[str, Any], stated: Mapping[str, Mapping[str, Any]], path: str, monitor: MonitorConfig
) -> list[str]:
    """Messages about kNN that the recipe does not state, or that scores other images than those trained on.

    ``own`` are the tables before the overrides, ``stated`` those of the overrides, ``path`` is that of the data.
    """
    if not monitor.every_epochs:
        return []
    if "every_epochs" not in monitor.model_fields_set:
        period = pluralize(monitor.every_epochs, "epoch")
        return [f"[monitor] data without every_epochs: kNN every {period}; --set monitor.every_epochs=0 turns it off"]
    tables = [keys if isinstance(keys, dict) else {} for keys in (own.get("data"), own.get("monitor"))]
    trained, scored = tables[0].get("path"), tables[1].get("data")
    if "data" in stated.get("monitor", {}) or scored != monitor.data or not trained or trained == path:
        return []
    line = shlex.quote(f"monitor.data={path}")
    return [
        f"[monitor] data: the recipe's kNN scores {scored!r}, not the images trained on; --set {line} scores those (it "
        "needs labels: a folder per class), and --set monitor.every_epochs=0 turns kNN off"
    ]


def _not_sharded(recipe: "Recipe") -> list[str]:
    """Options that do not work with ``[train] shard``."""
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
        "[adapt] anchor or lora_rank": bool(recipe.adapt.anchor or recipe.adapt.lora_rank),
        "[monitor] layer_gradients": recipe.monitor.layer_gradients,
    }
    return [f"[train] shard: does not work with {what}" for what, found in unfit.items() if found]


def view_mistake(name: str, method: type[Method], role: str, made: int) -> str:
    """What is wrong with the number of views of one role, in a few words; empty if the method takes so many.

    Args:
        name: Of the method.
        method: Its class.
        role: One of `VIEW_ROLES`.
        made: How many views of this role are made of each image.

    Raises:
        UserError: The method declares a role that there is not.
    """
    if unknown := sorted(set(method.views) - set(VIEW_ROLES)):
        raise UserError(f"[method] name: {name} declares views of role {unknown[0]!r}; the roles are {VIEW_ROLES}")
    count = method.views.get(role, 0)
    fewest, most = count if isinstance(count, tuple) else (count, count)
    if made >= fewest and (most is None or made <= most):
        return ""
    if most == 0:
        way_out = "set it to 0"
        if role == "local" and method.views is Method.views and not method.__module__.startswith("sslkit."):
            way_out += f'. If it takes them, declare views = {{"global": 2, "local": (0, None)}} in {method.__name__}'
        return f"{name} takes no {role} views; {way_out}"
    if most is None:
        return f"{name} takes {fewest} or more {role} views; set it to {fewest}"
    wanted = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return f"{name} takes {wanted} {role} views; set it to {min(max(made, fewest), most)}"
