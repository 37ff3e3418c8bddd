"""Which of a paper's numbers fill in what a recipe leaves out, and whether they are of a run like this one."""

from collections.abc import Mapping
from typing import Any

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
