"""Which of a paper's numbers fill in what a recipe leaves out, and whether they are of a run like this one."""

import json
from collections.abc import Mapping
from typing import Any

from sslkit.data.augment.policies import POLICIES
from sslkit.data.augment.views_config import LATER_KEYS, ViewsConfig, states_all_others
from sslkit.methods import Method
from sslkit.parts.backbone import family


def paper_defaults(method: type[Method], tables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The paper's recipe, with the numbers of its run of this length or batch size if it has one."""
    kind = family(tables["backbone"]["name"])
    defaults = method.paper_defaults(kind)
    train = {**defaults.get("train", {}), **tables.get("train", {})}
    for run in method.paper_runs(kind):
        if run.train.items() <= train.items():
            laid = {table: {**defaults.get(table, {}), **keys} for table, keys in run.tables.items()}
            known = method.Options.model_fields  # a method that builds on another may have fewer options
            laid["method"] = {key: value for key, value in laid.get("method", {}).items() if key in known}
            return {**defaults, **laid}
    return defaults


def numbers_of_another_run(method: type[Method], tables: Mapping[str, Any], parsed: Mapping[str, Any]) -> list[str]:
    """Say which of the numbers that were filled in belong to a run of the paper of another length or batch size."""
    kind = family(tables["backbone"]["name"])
    defaults, runs = method.paper_defaults(kind), method.paper_runs(kind)
    asked = parsed["train"].model_dump()
    usual = [run for run in runs if run.train.items() <= defaults.get("train", {}).items()]
    if not usual or any(run.train.items() <= asked.items() for run in runs):
        return []
    kinds = {"optim": "name", "schedule": "decay"}  # numbers of another optimizer or decay are not the paper's
    filled = [
        f"[{table}] {key} = {value}"
        for table, keys in usual[0].tables.items()
        for key, value in keys.items()
        if key not in tables.get(table, {}) and getattr(parsed[table], key, None) == value
        if table not in kinds or getattr(parsed[table], kinds[table]) == defaults[table][kinds[table]]
    ]
    if not filled:
        return []
    (key,) = usual[0].train
    lengths = ", ".join(str(run.train[key]) for run in runs)
    return [
        f"[train] {key} = {asked[key]}: the paper's numbers are for {lengths}; {', '.join(filled)} "
        f"{'is' if len(filled) == 1 else 'are'} what it has for {usual[0].train[key]}. State them to choose others"
    ]


def origin_of_views(given: dict[str, Any], views: ViewsConfig) -> str:
    """Say which views are made where a recipe is as it was before `LATER_KEYS`, or keeps the views of then; else empty.

    Args:
        given: The ``[views]`` table that the recipe states.
        views: What became of it.
    """
    policy = {key: POLICIES[views.policy].get(key, ViewsConfig.model_fields[key].default) for key in LATER_KEYS}
    earlier = {key: ViewsConfig.model_fields[key].default for key in LATER_KEYS}
    made = {key: getattr(views, key) for key in LATER_KEYS}
    if policy == earlier or not states_all_others(given):
        return ""
    if made == earlier:
        return (
            f"[views] policy = {views.policy!r}: views are made by torchvision's rules, as before sslkit followed the "
            f"paper's code; a new run gets the paper's with {_stated(policy, earlier)}"
        )
    if not given.keys().isdisjoint(LATER_KEYS):
        return ""
    return (
        f"[views] policy = {views.policy!r}: views are made by the rules of the paper's code, which the recipe does "
        f"not state; for torchvision's, as earlier versions made them, give {_stated(earlier, policy)}"
    )


def _stated(values: dict[str, Any], others: dict[str, Any]) -> str:
    """The keys in which values differ from others, as a recipe states them."""
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items() if value != others[key])
