"""No shipped recipe has a fault, whatever advice its small stand-in calls for."""

import tomllib
from typing import Any

import pytest

from sslkit.doctor import check_recipe, run_checks
from sslkit.doctor.findings import Check
from sslkit.parts.backbone import family
from sslkit.recipe.resolve import Recipe, build_recipe, shipped_recipes

FITTING = ("zero_init_last", "init", "pos_embed", "freeze_patch_embed")
SMALLER = {"hidden_dim": 64, "queue_size": 512, "negatives": 256, "prototypes": 64, "bn_groups": 2}


def stand_in(name: str) -> Recipe:
    """The recipe on the bundled images, with a small net of its backbone's family, narrow heads and short queues."""
    tables = tomllib.loads(shipped_recipes()[name].read_text(encoding="utf-8"))
    backbone = tables["backbone"]
    if not backbone["name"].startswith("test_"):
        kept = {key: backbone[key] for key in FITTING if key in backbone}
        small = "test_vit" if family(backbone["name"]) == "vit" else "test_resnet"
        tables["backbone"] = {**kept, "name": small}
        tables["views"]["size"] = 32
    tables["views"].setdefault("local", {})["size"] = 16
    tables["data"] = {"path": "builtin:fashion_mnist", "split": "test", "workers": 0}
    method: dict[str, Any] = tables["method"]
    method |= {key: min(method[key], value) for key, value in SMALLER.items() if method.get(key)}
    tables["train"] |= {"batch_size": 8, "micro_batch": min(tables["train"].get("micro_batch", 0), 4)}
    tables.pop("monitor", None)
    return build_recipe(tables, name=name)


@pytest.mark.full
@pytest.mark.parametrize("name", shipped_recipes())
def test_no_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_checks, "forecast_time", lambda *_: Check("data loading").ok("not timed here"))
    report = check_recipe(stand_in(name))
    assert report.of("fault") == []
    assert not [finding for finding in report.findings if "could not be checked" in finding.sentence]
