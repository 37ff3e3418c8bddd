"""What figures show: levels at chance, peaks that thinning keeps, gradients by layer, similarities, alarms."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_recipe

from sslkit.evaluate.protocol import protocol_hash
from sslkit.parts.queue import KeyQueue
from sslkit.recipe.resolve import load_recipe
from sslkit.report.accuracy_figures import accuracy_panel, score_rows
from sslkit.report.chance_level import chance_of, queue_full_at
from sslkit.report.figures import thin
from sslkit.report.health_figures import collapse_panels, gradient_panel
from sslkit.report.run_record import RunRecord
from sslkit.report.summary import alarms_of
from sslkit.report.training_figures import training_panels


def record(metrics: list[dict[str, Any]] | None = None, **logs: list[dict[str, Any]]) -> RunRecord:
    metrics = metrics or [{"step": 10, "epoch": 1.0, "loss": 2.0}]
    results, diagnostics = logs.get("results", []), logs.get("diagnostics", [])
    return RunRecord(Path("run"), "run", small_recipe("moco_v2", "test_resnet"), {}, metrics, results, diagnostics)


# Measured on random unit vectors with the official functions' formulae; symmetric losses are summed.
@pytest.mark.parametrize(
    ("recipe", "level", "tolerance"),
    [
        ("mocov1_r50", 11.88, 0.005),
        ("mocov2_r50", 11.188, 0.0005),
        ("quickstart", 2 * 8.707, 0.001),
        ("mocov3_r50", 33.279, 0.0005),
        ("mocov3_vitb", 6.693, 0.0005),
        ("byol_r50", 4.0, 1e-12),
    ],
)
def test_levels_at_chance(recipe: str, level: float, tolerance: float) -> None:
    known = chance_of(load_recipe(recipe), 1000)
    assert known is not None
    assert known[0] == pytest.approx(level, abs=tolerance)


def test_a_queue_is_full_when_its_first_keys_are_gone() -> None:
    for symmetric, views in ((False, 1), (True, 2)):
        recipe = small_recipe("moco_v2", method={"symmetric": symmetric, "queue_size": 200}, train={"batch_size": 32})
        queue, steps = KeyQueue(200, 4), 0
        first = {tuple(key) for key in queue.keys.tolist()}
        while first & {tuple(key) for key in queue.keys.tolist()}:
            queue.push(torch.nn.functional.normalize(torch.randn(32 * views, 4), dim=1))
            steps += 1
        assert queue_full_at(recipe) == steps
    assert queue_full_at(small_recipe("simclr")) == 0


def test_thinning_keeps_every_peak_and_leaves_few_values_alone() -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    values[12_345], values[43_210] = 99.0, -99.0
    kept = thin(values.tolist(), 1000)
    assert len(kept) <= 1000
    assert {12_345, 43_210} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert thin([3.0, 1.0, 2.0], 3).tolist() == [0, 1, 2]


def test_gradients_by_layer_are_logarithms_and_spikes_stay() -> None:
    rows = [
        {"step": step, "epoch": step / 100, "gradient/stem": 0.1, "gradient/head": 10.0 if step != 777 else 1000.0}
        for step in range(1, 1001)
    ]
    rows[4] |= {"gradient/stem": float("nan"), "gradient/late": 0.0}
    panel = gradient_panel(record(rows), "Gradients")
    (heat,) = json.loads(panel.figure)["data"]
    assert heat["y"] == ["stem", "head", "late"]
    stem, head, late = (np.asarray(line, dtype=float) for line in heat["z"])
    assert stem.tolist() == pytest.approx([-1.0] * len(stem))
    assert sorted(set(head.tolist())) == pytest.approx([1.0, 3.0])
    assert np.isnan(late).all()
    assert heat["x"][int(head.argmax())] in range(777, 780)
    assert "largest norm of its interval" in panel.note
    assert "layer_gradients = true" in gradient_panel(record(), "Gradients").absent


def test_similarities_are_shares_and_broken_diagnoses_are_passed_over() -> None:
    good = {"positive_histogram": [1, 3], "negative_histogram": [3, 0], "histogram_edges": [-1.0, 0.0, 1.0]}
    rows = [
        {"step": 1, "epoch": 0.1, **good, "alarms": "none of a list", "lidar": float("nan")},
        {"step": 2, "epoch": 0.2, **good, "histogram_edges": [-1.0, 1.0]},
        {"step": 3, "epoch": 0.3, "effective_rank": 4.0},
        {"step": 4, "epoch": 0.4, **good, "positive_histogram": [0, 0]},
    ]
    run = record(diagnostics=rows)
    panels = {panel.title: json.loads(panel.figure) for panel in collapse_panels([run])}
    assert set(panels) == {"Effective rank", "Similarities"}
    negative, positive = panels["Similarities"]["data"]
    assert (negative["x"], negative["y"], positive["y"]) == ([-0.5, 0.5], [1.0, 0.0], [0.0, 0.0])
    (slider,) = panels["Similarities"]["layout"]["sliders"]
    assert [step["args"][0]["y"][1] for step in slider["steps"]] == [[0.25, 0.75], [0.0, 0.0]]
    assert alarms_of(run) == []


def test_alarms_are_told_once_and_standing_ones_first() -> None:
    said = [["old"], ["old", "new"], ["new"]]
    rows = [{"step": 10 * place, "alarms": alarms} for place, alarms in enumerate(said, start=1)]
    found = [(alarm.message, alarm.first, alarm.last, alarm.active) for alarm in alarms_of(record(diagnostics=rows))]
    assert found == [("new", 2.0, 3.0, True), ("old", 1.0, 2.0, False)]


def test_whatever_else_a_method_logs_is_drawn_and_what_it_lacks_is_said() -> None:
    rows = [{"step": step, "epoch": step / 2, "loss": 1.0, "entropy": 0.1 * step, "mood": "good"} for step in (1, 2)]
    panels = {panel.title: panel for panel in training_panels([record(rows)])}
    assert json.loads(panels["entropy"].figure)["data"][0]["y"] == [0.1, 0.2]
    assert "mood" not in panels
    assert panels["Momentum of the teacher"].absent == "This method has no momentum teacher."


def test_scores_of_evaluations_supersede_the_monitors_and_not_finite_ones_are_left_out() -> None:
    watched = {"by": "monitor", "evaluation": "knn", "data": "d", "epoch": 1.0}
    results = [
        {**watched, "step": 5, "epoch": 0.5, "accuracy": 0.25},
        {**watched, "step": 10, "accuracy": 0.5},
        {"by": "eval", "evaluation": "linear", "step": 10, "data": "d", "accuracy": float("nan")},
    ]
    run = record(results=results)
    assert [(row["evaluation"], row["accuracy"]) for row in score_rows([run])] == [("knn", "50.00%")]
    (trace,) = json.loads(accuracy_panel([run]).figure)["data"]
    assert (trace["x"], trace["y"]) == ([0.5, 1.0], [25.0, 50.0])
    again = {"by": "eval", "evaluation": "knn", "step": 10, "data": "d", "accuracy": 0.5}
    both = record(results=[*results, {**again, "scores": [{"encoder": "run", "accuracy": 0.5}]}])
    assert len(score_rows([both])) == 1


def test_scores_of_other_data_or_protocols_are_curves_of_their_own() -> None:
    """What `eval knn` says of other data neither joins the monitor's curve nor hides its last score."""
    name = {"evaluation": "knn k=20", "protocol_hash": "aa", "protocol": {"k": 20}}
    watched = [{**name, "by": "monitor", "data": "d", "step": step, "accuracy": step / 40} for step in (5, 10)]
    watched[0] |= {"protocol": {"k": 20, "left_out": 1}}
    for row in watched:
        row["protocol_hash"] = protocol_hash(row["protocol"])
    elsewhere = {**name, "by": "eval", "data": "e", "step": 10, "accuracy": 0.9}
    nearer = {**watched[1], "by": "eval", "protocol_hash": "bb", "protocol": {"k": 20, "crop_pct": 1}, "accuracy": 0.7}
    run = record(results=[*watched, elsewhere, nearer])
    drawn = {trace["name"]: trace["y"] for trace in json.loads(accuracy_panel([run]).figure)["data"]}
    assert drawn == {
        f"knn k=20, d [{watched[1]['protocol_hash']}]": [12.5, 25.0],
        "knn k=20, e": [90.0],
        "knn k=20, d [bb]": [70.0],
    }
    shown = [(row["evaluation"], row["data"], row["accuracy"]) for row in score_rows([run])]
    assert shown == [
        (f"knn k=20 [{watched[1]['protocol_hash']}]", "d", "25.00%"),
        ("knn k=20", "e", "90.00%"),
        ("knn k=20 [bb]", "d", "70.00%"),
    ]
    same = record(results=[*watched, {**watched[1], "by": "eval"}])
    (trace,) = json.loads(accuracy_panel([same]).figure)["data"]
    assert (trace["name"], trace["y"]) == ("knn k=20", [12.5, 25.0, 25.0])
    assert len(score_rows([same])) == 1
    old = record(results=[{**row, "protocol": None, "protocol_hash": ""} for row in watched] + [nearer])
    assert [trace["y"] for trace in json.loads(accuracy_panel([old]).figure)["data"]] == [[12.5, 25.0], [70.0]]
