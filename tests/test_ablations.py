"""The ablation cells resolve, differ as they say, and their page is written from what was run."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ablations(monkeypatch_module: pytest.MonkeyPatch) -> object:
    monkeypatch_module.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("ablations")


@pytest.fixture(scope="module")
def monkeypatch_module() -> object:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_every_cell_resolves_to_a_recipe_of_its_own(ablations: object) -> None:
    cells = ablations.read_cells("", 0)
    assert len(cells) == len({cell.folder for cell in cells})
    assert {cell.seed for cell in cells} == {0, 1, 2}
    by_label = {(cell.group, cell.label): cell.recipe() for cell in cells if cell.seed == 0}
    assert by_label["Momentum", "0"].method.momentum == 0.0
    assert by_label["From v1 to v2", "v1"].schedule.decay == "steps"
    assert not hasattr(by_label["From v1 to v2", "v1"].method, "hidden_dim")
    assert by_label["SimCLR's batch", "512, slices of 64"].train.micro_batch == 64
    pair = by_label["Pairs of augmentations, in colour", "jitter + grey"].views
    assert (pair.crop_scale, pair.jitter_prob, pair.gray_prob, pair.blur_prob) == ((1.0, 1.0), 0.8, 0.5, 0.0)


def test_a_measured_cell_is_known_by_what_the_table_says_of_it(
    ablations: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = ablations.read_cells("Momentum", 1)
    monkeypatch.setattr(ablations, "RUNS", tmp_path)
    monkeypatch.setattr(ablations, "MEASURED", tmp_path / "measured.json")
    (tmp_path / "measured.json").write_text(json.dumps({cells[0].key: {"knn": 0.1}, "of an older table": {"knn": 1.0}}))
    cells[1].folder.mkdir()
    (cells[1].folder / "cell.json").write_text('{"knn": 0.8}')
    found = ablations.save_measured()
    assert found == {("Momentum", "0", 0): {"knn": 0.1}, ("Momentum", "0.9", 0): {"knn": 0.8}}
    assert set(json.loads((tmp_path / "measured.json").read_text())) == {cells[0].key, cells[1].key}


def test_the_page_tells_what_was_not_run(ablations: object, tmp_path: Path) -> None:
    spec = {"group": [{"name": "G", "claim": "c", "cells": [{"label": "a"}, {"label": "b"}]}]}
    found = {("G", "a", seed): {"knn": 0.8 + 0.01 * seed, "pretext": 0.5} for seed in range(3)}
    page = sys.modules["ablations_page"].write_page(spec, found, tmp_path).read_text()
    assert "| a | 81.0 % | 80.0 to 82.0 | 3 |" in page
    assert "| b | not run | | |" in page
    assert (tmp_path / "pictures/ablations.png").stat().st_size > 1000


def test_a_spike_is_blamed_on_the_layer_that_jumped_more(ablations: object) -> None:
    calm = {"grad_norm": 1.0, "gradient/patch_embed": 1.0, "gradient/blocks.5": 1.0, "gradient/norm": 1.0}
    metrics = [{"step": step, **calm} for step in range(40)]
    metrics[30] |= {"grad_norm": 9.0, "gradient/patch_embed": 8.0, "gradient/blocks.5": 4.0}
    metrics[35] |= {"grad_norm": 9.0, "gradient/patch_embed": 2.0, "gradient/blocks.5": 4.0}
    assert ablations.spikes(metrics) == {"spikes": 2, "first_layer": 1}
