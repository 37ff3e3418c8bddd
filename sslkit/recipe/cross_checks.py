"""Checks of a recipe that involve several tables."""

from typing import TYPE_CHECKING

from sslkit.data.augment.policies import POLICIES
from sslkit.errors import path_problem
from sslkit.methods import all_methods, find_method
from sslkit.methods.base import view_mistake
from sslkit.parts.backbone import takes_image_size

if TYPE_CHECKING:
    from sslkit.recipe.resolve import Recipe


def _path_mistakes(recipe: "Recipe") -> list[str]:
    """Check that all paths can be written to TOML."""
    named = [*recipe.data.paths(), ("[monitor] data", recipe.monitor.data)]
    named.append(("[backbone] pretrained", str(recipe.backbone.pretrained)))
    return [f"{key}: {fault}" for key, path in named if (fault := path_problem(path))]


def contradictions(recipe: "Recipe") -> list[str]:
    """Check values of different tables against each other; returns one sentence per mistake."""
    mistakes = _path_mistakes(recipe)
    if recipe.schedule.warmup_epochs > recipe.train.epochs:
        mistakes.append(
            f"[schedule] warmup_epochs: {recipe.schedule.warmup_epochs:g} epochs of warm-up do not fit in "
            f"[train] epochs = {recipe.train.epochs}"
        )
    if recipe.backbone.img_size and not takes_image_size(recipe.backbone.name):
        mistakes.append(
            f"[backbone] img_size: {recipe.backbone.name!r} takes images of any size; leave it out and set [views] size"
        )
    if recipe.checkpoint.keep_best and not recipe.monitor.every_epochs:
        mistakes.append(
            f"[checkpoint] keep_best: {recipe.checkpoint.keep_best!r} needs the monitor; set [monitor] "
            "every_epochs and data"
        )
    if (recipe.data.channels or 3) != recipe.backbone.channels or recipe.data.channels == 3:
        mistakes.append(
            f"[data] channels: {recipe.data.channels}, but the backbone takes {recipe.backbone.channels}; leave it "
            "out and set [backbone] args.in_chans"
        )
    mistakes += [f"[views] {mistake}" for mistake in recipe.views.unfit_for(recipe.backbone.channels)]
    mistakes += _views_not_taken(recipe)
    if recipe.schedule.decay == "steps" and not recipe.schedule.milestones:
        mistakes.append(
            "[schedule] milestones: decay = 'steps' needs the epochs of the learning rate drops, such as [120, 160]"
        )
    return mistakes + _not_sharded(recipe)


def _views_not_taken(recipe: "Recipe") -> list[str]:
    """Compare the configured views with those that the method takes."""
    name, method, counts = recipe.method_name, find_method(recipe.method_name), recipe.views.counts()
    mistakes = []
    if view_mistake(name, method, "global", counts["global"]):
        mistakes.append(
            f"[method] name: {name} takes {method.views.get('global', 0)} global views, but sslkit makes "
            f"{counts['global']} of each image"
        )
    if mistake := view_mistake(name, method, "local", counts["local"]):
        of_policy = POLICIES[recipe.views.policy].get("local", {}).get("count", 0) == counts["local"] != 0
        origin = f" (of policy {recipe.views.policy!r})" if of_policy else ""
        mistakes.append(f"[views.local] count: {counts['local']}{origin}, but {mistake}")
    return mistakes


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
        "[monitor] layer_gradients": recipe.monitor.layer_gradients,
    }
    return [f"[train] shard: does not work with {what}" for what, found in unfit.items() if found]
