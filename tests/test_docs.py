"""The documented example is a real method, and what README and docs name exists."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import sslkit
from sslkit.cli import app
from sslkit.evaluate.probes.linear import LinearProtocol
from sslkit.methods import METHODS
from sslkit.recipe.resolve import build_recipe, shipped_recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_method_of_the_docs_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("simsiam", ROOT / "docs" / "examples" / "plugin" / "simsiam.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "simsiam", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "simsiam", module.SimSiam)
    recipe = build_recipe(
        {
            "method": {"name": "simsiam", "dim": 32, "bottleneck": 8},
            "backbone": {"name": "test_resnet"},
            "data": {"path": "builtin:fashion_mnist", "split": "test", "workers": 0},
            "views": {"size": 32},
            "train": {"batch_size": 32, "max_steps": 12, "log_every": 1},
        }
    )
    losses = [row["loss"] for row in sslkit.train(recipe, tmp_path / "run").metrics()]
    assert min(losses[6:]) < losses[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_only_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"recipes/(\w+)\.toml", text):
        assert name in shipped_recipes(), name
    for path in re.findall(r"`((?:sslkit|tests|docs|benchmarks|recipes)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"^sslkit (\w+)", text, flags=re.M):
        known = {info.name or info.callback.__name__ for info in app.registered_commands if info.callback}
        assert command in known | {group.name for group in app.registered_groups}, command


def test_a_reference_names_a_protocol_that_there_is() -> None:
    named = {}
    for name in shipped_recipes():
        reference = tomllib.loads((ROOT / f"recipes/{name}.toml").read_text(encoding="utf-8")).get("reference", {})
        if "linear_protocol" in reference:
            named[name] = reference["linear_protocol"]
    assert named["simclr_r50"] == "simclr"
    for protocol in named.values():
        LinearProtocol.from_name(protocol, is_vit=False)
