"""Fill in missing keys of a recipe from its paper, and report values of a paper run of another length or batch size."""

import json
from collections.abc import Mapping
from typing import Any

from sslkit.data.augment.policies import POLICIES
from sslkit.data.augment.views_config import LATER_KEYS, ViewsConfig, states_all_others
from sslkit.methods import Method
from sslkit.parts.backbone import family


def paper_defaults(method: type[Method], tables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The defaults of the paper, with the values of its run of this length or batch size if there is one."""
    kind = family(tables["backbone"]["name"])
    defaults = method.paper_defaults(kind)
    train = {**defaults.get("train", {}), **tables.get("train", {})}
    for run in method.paper_runs(kind):
        if run.train.items() <= train.items():
            merged = {table: {**defaults.get(table, {}), **keys} for table, keys in run.tables.items()}
            known = method.Options.model_fields  # a derived method may have fewer options
            merged["method"] = {key: value for key, value in merged.get("method", {}).items() if key in known}
            return {**defaults, **merged}
    return defaults


def values_of_another_run(method: type[Method], tables: Mapping[str, Any], parsed: Mapping[str, Any]) -> list[str]:
    """Messages about filled-in values that the paper used for a run of another length or batch size."""
    kind = family(tables["backbone"]["name"])
    defaults, runs = method.paper_defaults(kind), method.paper_runs(kind)
    asked = parsed["train"].model_dump()
    usual = [run for run in runs if run.train.items() <= defaults.get("train", {}).items()]
    if not usual or any(run.train.items() <= asked.items() for run in runs):
        return []
    kinds = {"optim": "name", "schedule": "decay"}  # with another one, values are not the paper's
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
        f"[train] {key} = {asked[key]}: the paper has values for {lengths} only; {', '.join(filled)} "
        f"{'is' if len(filled) == 1 else 'are'} the paper's for {usual[0].train[key]}. Set other values in the recipe"
    ]


def origin_of_views(given: dict[str, Any], views: ViewsConfig) -> str:
    """A message about which views are made if a recipe is older than `LATER_KEYS`, or keeps the earlier views.

    ``given`` is the ``[views]`` table as stated. Empty if there is nothing to report.
    """
    policy = {key: POLICIES[views.policy].get(key, ViewsConfig.model_fields[key].default) for key in LATER_KEYS}
    earlier = {key: ViewsConfig.model_fields[key].default for key in LATER_KEYS}
    made = {key: getattr(views, key) for key in LATER_KEYS}
    if policy == earlier or not states_all_others(given):
        return ""
    if made == earlier:
        return (
            f"[views] policy = {views.policy!r}: views follow torchvision, as in earlier versions; a new run "
            f"follows the paper's code with {_stated(policy, earlier)}"
        )
    if not given.keys().isdisjoint(LATER_KEYS):
        return ""
    return (
        f"[views] policy = {views.policy!r}: views follow the paper's code, which the recipe does not state; to follow "
        f"torchvision, as earlier versions did, set {_stated(earlier, policy)}"
    )


def _stated(values: dict[str, Any], others: dict[str, Any]) -> str:
    """The keys that differ from ``others``, in the syntax of a recipe."""
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items() if value != others[key])
